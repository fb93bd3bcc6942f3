"""/v1/videos: asked for now, fetched when they are done. Clips are held in memory, the latest few."""

import asyncio
import io
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from diffquant import run, video
from diffquant.serve import admission
from diffquant.serve.bodies import VIDEO_FIELDS, VideoBody, named
from diffquant.serve.engine import Facts
from diffquant.serve.images import ended, finished, job_of, result_of
from diffquant.serve.jobs import Job, State
from diffquant.serve.refusals import Refused, of_validation
from diffquant.serve.service import Service
from diffquant.serve.uploads import Uploads, inline, told

KEPT = 32  # clips
SHEET = 4  # frames beside and below each other on a contact sheet
#: What OpenAI calls the picture a video begins with; its clients send a text of it inside an object.
FIRST = "input_reference"
FIRST_TEXTS = (FIRST, f"{FIRST}[image_url]")
FIELDS_MOST = 40

Variant = Literal["video", "thumbnail", "spritesheet"]


@dataclass(slots=True, kw_only=True)
class Clip:
    """One video on its way; `files` is filled when it has been drawn and written."""

    job: Job
    files: dict[str, tuple[bytes, str]] | None = None
    error: Refused | None = None
    completed: int | None = None
    task: "asyncio.Task[None] | None" = None

    @property
    def id(self) -> str:
        return f"video_{self.job.id}"

    @property
    def status(self) -> str:
        if self.error is not None:
            return str(State.FAILED)
        if self.files is not None:
            return str(State.COMPLETED)
        return str(State.QUEUED if self.job.state is State.QUEUED else State.RUNNING)

    def to_json(self, model: str) -> dict[str, Any]:
        """openai's Video, and the request as it runs."""
        asked = self.job.request
        frames, fps = asked.num_frames or 1, asked.fps or run.DEFAULT_FPS
        done = 100 * self.job.step // self.job.steps
        error = self.error and {"code": self.error.code or "failed", "message": self.error.message}
        return {
            "id": self.id,
            "object": "video",
            "model": model,
            "status": self.status,
            "progress": 100 if self.files is not None else min(done, 99),
            "created_at": self.job.created,
            "completed_at": self.completed,
            "expires_at": None,
            "size": f"{asked.width}x{asked.height}",
            "seconds": f"{frames / fps:g}",
            "error": error,
            "prompt": asked.prompt,
            "remixed_from_video_id": None,
            "request": {
                name: value for name, value in told(asked).typed.items() if name != "prompt"
            },
        }


class Clips:
    """The latest clips of one service, oldest first."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._held: OrderedDict[str, Clip] = OrderedDict()

    def add(self, job: Job) -> Clip:
        """Put the job into the line, and let an ended clip go where there are many."""
        self.service.line.join(job)
        clip = Clip(job=job)
        self._held[clip.id] = clip
        past = [key for key, held in self._held.items() if held.status in ("completed", "failed")]
        for key in past[: max(len(self._held) - KEPT, 0)]:
            del self._held[key]
        clip.task = asyncio.create_task(_follow(clip))
        return clip

    def find(self, name: str) -> Clip:
        if name not in self._held:
            raise Refused(404, f"there is no video {name[:80]!r}", param="video", code="not_found")
        return self._held[name]

    def remove(self, name: str) -> Clip:
        clip = self.find(name)
        self.service.line.stop(clip.job, "cancelled")
        del self._held[name]
        return clip

    def page(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[Clip], bool]:
        """Clips after the one named, and whether there are more."""
        clips = list(self._held.values())[:: -1 if newest_first else 1]
        names = [clip.id for clip in clips]
        start = names.index(after) + 1 if after in names else 0
        return clips[start : start + limit], len(clips) > start + limit


def router(service: Service) -> APIRouter:
    """The routes of videos."""
    routes = APIRouter(prefix="/v1/videos", tags=["videos"])
    clips = Clips(service)

    def alone() -> None:
        service.require_alone(
            "a video asked for now is held by who draws it", "POST /v1/videos/sync"
        )

    later = [Depends(alone)]

    @routes.post("", dependencies=later, summary="Ask for a video", openapi_extra=_BODY)
    async def create(request: Request) -> dict[str, Any]:
        return clips.add(await _job(service, request)).to_json(service.model)

    @routes.post("/sync", summary="Ask for a video and wait for it", openapi_extra=_BODY)
    async def sync(request: Request) -> Response:
        job = await _job(service, request)
        service.line.join(job)
        result = await finished(service, job, request)
        files = await asyncio.to_thread(_files, result)
        data, kind = files["video"]
        headers = {
            "X-Request-Id": job.name or job.id,
            "X-Model": service.model,
            "X-Inference-Time-S": f"{result.seconds:.3f}",
        }
        return Response(data, media_type=kind, headers=headers)

    @routes.get("", dependencies=later, summary="The latest videos")
    async def listed(
        after: str | None = None,
        limit: int = Query(20, ge=1, le=100),
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        page, more = clips.page(after, limit, order == "desc")
        return {
            "object": "list",
            "data": [clip.to_json(service.model) for clip in page],
            "has_more": more,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
        }

    @routes.get("/{name}", dependencies=later, summary="Where a video stands")
    async def one(name: str) -> dict[str, Any]:
        return clips.find(name).to_json(service.model)

    @routes.delete(
        "/{name}", dependencies=later, summary="Stop a video at its next step and forget it"
    )
    async def remove(name: str) -> dict[str, Any]:
        return {"id": clips.remove(name).id, "object": "video.deleted", "deleted": True}

    @routes.get(
        "/{name}/content",
        dependencies=later,
        summary="The video, its first frame, or a sheet of frames",
    )
    async def content(name: str, variant: Variant = "video") -> Response:
        clip = clips.find(name)
        if clip.files is None:
            raise Refused(404, f"the video is {clip.status}", code="not_ready")
        data, kind = clip.files[variant]
        return Response(data, media_type=kind)

    return routes


def _schema() -> dict[str, Any]:
    schema = VideoBody.model_json_schema()
    picture = {"type": "string", "format": "binary", "description": "the picture it begins with"}
    schema["properties"] |= {FIRST: picture}
    return schema


#: For /openapi.json: openai's client sends a form, others JSON.
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": VideoBody.model_json_schema()},
            "multipart/form-data": {"schema": _schema()},
        },
    }
}


async def _job(service: Service, request: Request) -> Job:
    facts, limits = service.facts, service.settings.limits
    fields, first = await _parts(request, limits.upload)
    body = _validated(fields)
    named(body.model, service.model)
    _require_videos(facts)
    _require_first(first, facts)
    wanted = body.request_at(facts.fps)
    if first is None:
        return job_of(service, body, admission.admitted(wanted, facts, limits), request)
    uploads = Uploads(limits)
    try:
        path = await asyncio.to_thread(uploads.picture, first, FIRST)
        admitted = admission.admitted(replace(wanted, image=(path,)), facts, limits)
        job = job_of(service, body, admitted, request)
    except BaseException:
        uploads.drop()
        raise
    uploads.belong_to(job)
    return job


def _require_videos(facts: Facts) -> None:
    if not facts.makes_videos:
        raise Refused(
            400, f"a {facts.pipeline_class.__name__} makes pictures: POST /v1/images/generations"
        )
    if find_spec("av") is None:
        raise Refused(501, "the server cannot write MP4: pip install 'diffquant[video]'")


def _require_first(first: bytes | None, facts: Facts) -> None:
    kind = facts.pipeline_class.__name__
    if first is not None and not facts.takes_picture:
        raise Refused(
            400,
            f"{FIRST} would be ignored: a {kind} makes videos of a prompt alone",
            param=FIRST,
            code="ignored_parameter",
        )
    if first is None and facts.needs_picture:
        raise Refused(
            400,
            f"a {kind} begins with a picture: send {FIRST}",
            param=FIRST,
            code="missing_value",
        )


async def _parts(request: Request, most: int) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a form or of JSON, and the picture the video begins with."""
    if "form" in request.headers.get("content-type", ""):
        async with request.form(max_files=1, max_fields=FIELDS_MOST, max_part_size=most) as form:
            fields: dict[str, Any] = dict(form)
            return fields, await _first(fields)
    try:
        fields = await request.json()
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is neither JSON nor a form", code="invalid_value") from error
    if not isinstance(fields, dict):
        raise Refused(400, "the body is no JSON object", code="invalid_value")
    return fields, await _first(fields)


async def _first(fields: dict[str, Any]) -> bytes | None:
    """Takes the first picture out of the fields. Raises Refused for a file of another name."""
    given = next((fields.pop(name) for name in FIRST_TEXTS if name in fields), None)
    for name, value in fields.items():
        if isinstance(value, UploadFile):
            raise Refused(
                400,
                f"{name} would be ignored: the only file of a video is {FIRST}",
                param=name,
                code="ignored_parameter",
            )
    if isinstance(given, UploadFile):
        return await given.read()
    if isinstance(given, dict) and set(given) == {"image_url"}:
        given = given["image_url"]
    return None if given is None else inline(str(given), FIRST)


def _validated(fields: dict[str, Any]) -> VideoBody:
    try:
        return VideoBody.model_validate(fields)
    except ValidationError as error:
        raise of_validation(error.errors(), VIDEO_FIELDS) from error


async def _follow(clip: Clip) -> None:
    """Wait for the job, then write its files; whatever happens is told in the clip."""
    await ended(clip.job)
    try:
        result = result_of(clip.job)
        clip.files = await asyncio.to_thread(_files, result)
    except Refused as refused:
        clip.error = refused
    clip.completed = int(time.time())


def _files(result: run.Result) -> dict[str, tuple[bytes, str]]:
    """Every variant of the first video, with its media type."""
    film, written = result.films[0], io.BytesIO()
    record = json.dumps({run.METADATA_KEY: True, **result.record})
    video.WRITERS[".mp4"](film, record, written)
    return {
        "video": (written.getvalue(), "video/mp4"),
        "thumbnail": (_bytes(film.frames[0], "WEBP"), "image/webp"),
        "spritesheet": (_bytes(_sheet(film.frames), "JPEG"), "image/jpeg"),
    }


def _sheet(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames evenly over the clip, row by row."""
    count = SHEET * SHEET
    shown = [frames[index * len(frames) // count] for index in range(count)]
    width, height = frames[0].size
    sheet = Image.new("RGB", (SHEET * width, SHEET * height))
    for index, frame in enumerate(shown):
        sheet.paste(frame, (index % SHEET * width, index // SHEET * height))
    return sheet


def _bytes(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, quality=90)
    return stream.getvalue()
