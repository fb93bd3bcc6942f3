"""/v1/images: draw, and show what was drawn."""

import asyncio
import base64
import contextlib
import json
import math
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from diffquant import run
from diffquant.serve import admission, wardrobe
from diffquant.serve.bodies import Delivery, Drawing, ImageBody, named
from diffquant.serve.engine import Facts
from diffquant.serve.jobs import Job, Preview, State, Stopped
from diffquant.serve.pictures import Picture, encode, encoded
from diffquant.serve.refusals import FINAL, Refused, of_failure
from diffquant.serve.service import Service

KEEP_ALIVE = 15.0  # seconds after which a silent stream says that it lives
AT_ONCE = 96 * 96  # pixels whose encoding takes a few milliseconds at most
NAME = re.compile(r"[\w.-]{1,80}", re.ASCII)


def router(service: Service) -> APIRouter:
    """The routes of pictures."""
    routes = APIRouter(prefix="/v1/images", tags=["images"])

    @routes.post("/generations", summary="Draw pictures of a prompt")
    async def generations(body: ImageBody, request: Request) -> Response:
        named(body.model, service.model)
        delivery = body.delivery()
        facts = service.facts
        if facts.makes_videos:
            raise Refused(400, f"a {facts.pipeline_class.__name__} makes videos: POST /v1/videos")
        require_previews(delivery, facts)
        require_reference(body, facts)
        wanted = admission.admitted(body.request(), facts, service.settings.limits)
        job = job_of(service, body, wanted, request, previews=delivery.partial_images)
        return await answered(service, job, delivery, request)

    @routes.get("/{job}/content", summary="A picture whose address was asked for")
    async def content(job: str, variant: int = 0) -> Response:
        service.require_alone("a picture's url leads to who drew it", "leave response_format out")
        picture = service.shelf.find(job, variant)
        if picture is None:
            raise Refused(
                404, "there is no such picture, or it is no longer kept", code="not_found"
            )
        return Response(picture.data, media_type=picture.media_type)

    return routes


async def answered(service: Service, job: Job, delivery: Delivery, request: Request) -> Response:
    """Puts the job into the line, and brings its pictures at once or step by step."""
    if delivery.as_url:
        service.require_alone("a picture's url leads to who drew it", "leave response_format out")
    if delivery.stream:
        return _streamed(service, job, delivery)
    service.line.join(job)
    result = await finished(service, job, request)
    pictures = await _encoded(result, delivery)
    return JSONResponse(
        _body(service, job, result, pictures, delivery, request), headers=_headers(job)
    )


def require_previews(delivery: Delivery, facts: Facts) -> None:
    """Raises Refused, 400, where previews are asked for and there are none."""
    if delivery.partial_images and not facts.previews:
        raise Refused(
            400,
            f"a {facts.pipeline_class.__name__} has no previews: leave partial_images out",
            param="partial_images",
            code="ignored_parameter",
        )


def require_reference(body: ImageBody, facts: Facts) -> None:
    """Raises Refused, 400, where a reference is asked for and there is none."""
    if body.reference and not facts.compares:
        raise Refused(
            400,
            "reference would be ignored: start the server with --reference",
            param="reference",
            code="ignored_parameter",
        )


def job_of(
    service: Service, body: Drawing, wanted: run.Request, request: Request, *, previews: int = 0
) -> Job:
    """A job for what is wanted, called as its client calls it."""
    name = request.headers.get("x-request-id")
    if name is not None and NAME.fullmatch(name) is None:
        raise Refused(
            400,
            "X-Request-Id takes up to 80 letters, digits, points and dashes",
            param="X-Request-Id",
        )
    steps = wanted.num_inference_steps or 1
    return Job(
        request=wanted,
        deadline=time.monotonic() + service.settings.timeout,
        name=name,
        user=body.user,
        reference=isinstance(body, ImageBody) and bool(body.reference),
        lora=wardrobe.asked(body.loras(), service.facts.lora),
        previews=spread(previews, steps),
    )


def spread(count: int, steps: int) -> frozenset[int]:
    """`count` steps evenly among all but the last, whose picture comes anyway."""
    return frozenset(max(1, steps * (index + 1) // (count + 1)) for index in range(count)) - {steps}


# ---------------------------------------------------------------------------------- one answer


async def finished(service: Service, job: Job, request: Request) -> run.Result:
    """The job's result; it is stopped when its client leaves or its time is over."""
    done = asyncio.create_task(ended(job))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait(
            {done, gone},
            timeout=job.deadline - time.monotonic(),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if job.outcome.done():
            return result_of(job)
        why = "the client left" if gone.done() else "timed out"
        service.line.stop(job, why)
        raise _stopped(why)
    except asyncio.CancelledError as over:
        # The server was told to stop, and the drain is over before the picture is done.
        raise Refused(503, "the server shuts down", code="closing") from over
    finally:
        done.cancel()
        gone.cancel()
        if not job.outcome.done():
            service.line.stop(job, "the client left")


async def ended(job: Job) -> None:
    """Returns when the job has ended, however it did."""
    with contextlib.suppress(Exception):
        await asyncio.wrap_future(job.outcome)


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def result_of(job: Job) -> run.Result:
    """Raises Refused for a job that did not end with pictures."""
    error = job.outcome.exception()
    if isinstance(error, Stopped):
        raise _stopped(str(error))
    if error is not None:
        raise of_failure(error)
    return job.outcome.result()


def _stopped(why: str) -> Refused:
    if why == "timed out":
        return Refused(504, "the picture was not done in time", code="timeout", headers=FINAL)
    return Refused(499, f"the request was stopped: {why}", code="cancelled", headers=FINAL)


def _body(
    service: Service,
    job: Job,
    result: run.Result,
    pictures: list[Picture],
    delivery: Delivery,
    request: Request,
) -> dict[str, Any]:
    if delivery.as_url:
        service.shelf.put(job.id, pictures)
        address = f"{request.base_url}v1/images/{job.id}/content?variant="
        data = [{"url": f"{address}{index}"} for index in range(len(pictures))]
    else:
        data = [{"b64_json": _text(picture)} for picture in pictures]
    compared = _compared(job, delivery)
    data = [{**told, **beside} for told, beside in zip(data, compared, strict=True)]
    return {"created": job.created, "data": data, **_facts(service, job, result, delivery)}


def _facts(service: Service, job: Job, result: run.Result, delivery: Delivery) -> dict[str, Any]:
    drawn = result.request
    return {
        "id": job.id,
        "background": "opaque",
        "output_format": delivery.format,
        "size": f"{drawn.width}x{drawn.height}",
        "model": service.model,
        "request": {name: value for name, value in drawn.typed.items() if name != "prompt"},
        "seeds": list(drawn.seeds),
        "inference_time_s": round(result.seconds, 3),
        "truth": list(service.facts.report.truth_lines),
        **({"notes": [note]} if (note := run.rounded(job.request, drawn)) else {}),
    }


def _compared(job: Job, delivery: Delivery) -> list[dict[str, Any]]:
    """What the reference drew, beside each picture."""
    if job.compared is None:
        return [{} for _ in job.request.seeds]
    told = list(job.compared.record["report"]["truth"])
    return [
        {"reference_b64_json": _text(picture), "reference_truth": told}
        for picture in encoded(job.compared, delivery)
    ]


async def _encoded(result: run.Result, delivery: Delivery) -> list[Picture]:
    """Beside the event loop, unless the way to another thread takes longer than the encoding."""
    if sum(math.prod(image.size) for image in result.images) <= AT_ONCE:
        return encoded(result, delivery)
    return await asyncio.to_thread(encoded, result, delivery)


def _text(picture: Picture) -> str:
    return base64.b64encode(picture.data).decode("ascii")


def _headers(job: Job) -> dict[str, str]:
    return {"X-Request-Id": job.name or job.id}


# ---------------------------------------------------------------------------------- step by step


def _streamed(service: Service, job: Job, delivery: Delivery) -> Response:
    inbox: asyncio.Queue[Preview | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(_: Job, preview: Preview | None) -> None:
        # A loop that is closed has nobody left who listens.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(inbox.put_nowait, preview)

    job.tell = tell
    service.line.join(job)
    return StreamingResponse(
        _events(service, job, delivery, inbox),
        media_type="text/event-stream",
        headers={**_headers(job), "Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _events(
    service: Service, job: Job, delivery: Delivery, inbox: "asyncio.Queue[Preview | None]"
) -> AsyncIterator[str]:
    shown = 0
    try:
        if delivery.progress:
            yield _progress(service, job, delivery)
        while not job.outcome.done():
            try:
                preview = await asyncio.wait_for(inbox.get(), _patience(job))
            except TimeoutError:
                if job.why_stopped is not None:
                    break
                yield _progress(service, job, delivery) if delivery.progress else ": waiting\n\n"
                continue
            if delivery.progress:
                yield _progress(service, job, delivery)
            if preview is not None:
                yield await _partial(job, preview, delivery, shown)
                shown += 1
        async for event in _ending(service, job, delivery):
            yield event
    finally:
        if not job.outcome.done():
            service.line.stop(job, "the client left")


def _patience(job: Job) -> float:
    return max(min(KEEP_ALIVE, job.deadline - time.monotonic()), 0.01)


async def _ending(service: Service, job: Job, delivery: Delivery) -> AsyncIterator[str]:
    try:
        if not job.outcome.done():
            raise _stopped(job.why_stopped or "timed out")
        result = result_of(job)
    except Refused as refused:
        yield _event("error", refused.body)
        return
    pictures = await _encoded(result, delivery)
    compared = await asyncio.to_thread(_compared, job, delivery)
    for picture, beside in zip(pictures, compared, strict=True):
        yield _event(
            f"{delivery.events}.completed",
            {
                "created_at": int(time.time()),
                "b64_json": _text(picture),
                "quality": "auto",
                "usage": _NOT_COUNTED,
                **_facts(service, job, result, delivery),
                **beside,
            },
        )


#: openai's type asks for it; a diffusion pipeline has no tokens to bill.
_NOT_COUNTED = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


async def _partial(job: Job, preview: Preview, delivery: Delivery, index: int) -> str:
    picture = await asyncio.to_thread(encode, preview.image, delivery)
    width, height = preview.image.size
    return _event(
        f"{delivery.events}.partial_image",
        {
            "b64_json": _text(picture),
            "partial_image_index": index,
            "created_at": int(time.time()),
            "background": "opaque",
            "output_format": delivery.format,
            "quality": "auto",
            "size": f"{width}x{height}",
            "id": job.id,
            "step": preview.step,
            "steps": job.steps,
        },
    )


def _progress(service: Service, job: Job, delivery: Delivery) -> str:
    waits = job.state is State.QUEUED
    return _event(
        f"{delivery.events}.progress",
        {
            **job.to_json(),
            "position": service.line.position(job) if waits else 0,
            "seconds_left": round(service.line.seconds_left(job), 1),
        },
    )


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
