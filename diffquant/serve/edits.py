"""/v1/images/edits: pictures in, as files of a form; pictures out, as for those that are drawn."""

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import FormData

from diffquant import run
from diffquant.serve import admission
from diffquant.serve.bodies import EDIT_FIELDS, EditBody, named
from diffquant.serve.engine import Facts
from diffquant.serve.images import answered, job_of, require_previews, require_reference
from diffquant.serve.refusals import Refused, of_validation
from diffquant.serve.service import Service
from diffquant.serve.uploads import Uploads, inline

#: Sides of a picture are rounded down to a multiple of this where no size is asked for.
ROUNDED = 16
#: OpenAI's clients send one picture as `image` and several as `image[]`.
PICTURES = ("image", "image[]")
MASK = "mask"
COMING_IN = (*PICTURES, MASK)
FIELDS_MOST = 40


def router(service: Service) -> APIRouter:
    """The route of edits."""
    routes = APIRouter(prefix="/v1/images", tags=["images"])

    @routes.post("/edits", summary="Edit pictures after a prompt", openapi_extra=_BODY)
    async def edits(request: Request) -> Response:
        facts = service.facts
        _require_editing(facts)
        most = service.settings.limits.pictures
        async with request.form(
            max_files=most + 1,
            max_fields=FIELDS_MOST,
            max_part_size=service.settings.limits.upload,
        ) as form:
            body = _body(form)
            named(body.model, service.model)
            delivery = body.delivery()
            require_previews(delivery, facts)
            require_reference(body, facts)
            uploads = Uploads(service.settings.limits)
            try:
                wanted = await _wanted(form, body, facts, uploads)
                admitted = admission.admitted(wanted, facts, service.settings.limits)
                job = job_of(service, body, admitted, request, previews=delivery.partial_images)
            except BaseException:
                uploads.drop()
                raise
        uploads.belong_to(job)
        try:
            return await answered(service, job, delivery, request)
        except Refused:
            # A job that never got into the line never ends.
            uploads.drop()
            raise

    return routes


def _require_editing(facts: Facts) -> None:
    if not facts.takes_picture:
        raise Refused(
            400,
            f"a {facts.pipeline_class.__name__} draws from a prompt alone: "
            "POST /v1/images/generations",
        )


def _body(form: FormData) -> EditBody:
    """Every field that is no picture."""
    texts = {
        name: value
        for name, value in form.multi_items()
        if isinstance(value, str) and name not in COMING_IN
    }
    try:
        return EditBody.model_validate(texts)
    except ValidationError as error:
        raise of_validation(error.errors(), EDIT_FIELDS) from error


async def _wanted(form: FormData, body: EditBody, facts: Facts, uploads: Uploads) -> run.Request:
    """What is to be drawn, from which pictures."""
    pictures: list[str] = []
    mask: str | None = None
    for name, value in form.multi_items():
        if isinstance(value, str) and name not in COMING_IN:
            continue
        data = inline(value, name) if isinstance(value, str) else await value.read()
        if name in PICTURES:
            pictures.append(await asyncio.to_thread(uploads.picture, data, "image"))
        elif name == MASK and mask is None:
            mask = await asyncio.to_thread(uploads.mask, data, MASK)
        else:
            raise _surplus(name)
    _require_pictures(pictures)
    if mask is not None and "mask_image" not in facts.fields:
        raise Refused(
            400,
            f"mask would be ignored: a {facts.pipeline_class.__name__} takes none",
            param=MASK,
            code="ignored_parameter",
        )
    return _sized(replace(body.request(), image=tuple(pictures), mask_image=mask))


def _surplus(name: str) -> Refused:
    return Refused(
        400,
        f"{name} would be ignored: files are image, image[] and one mask",
        param=name,
        code="ignored_parameter",
    )


def _require_pictures(pictures: list[str]) -> None:
    if not pictures:
        raise Refused(
            400, "there is no picture to edit: send image", param="image", code="missing_value"
        )


def _sized(wanted: run.Request) -> run.Request:
    """Where no size is asked for: that of the first picture."""
    if wanted.width or wanted.height:
        return wanted
    assert wanted.image is not None
    with Image.open(wanted.image[0]) as image:
        width, height = (max(side // ROUNDED, 1) * ROUNDED for side in image.size)
    return replace(wanted, width=width, height=height)


def _schema() -> dict[str, object]:
    schema = EditBody.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": file, "image[]": {"type": "array", "items": file}, MASK: file}
    return schema


_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": _schema()}},
    }
}
