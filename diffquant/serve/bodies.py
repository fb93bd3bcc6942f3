"""The fields of a body -> what is to be drawn, and how it is to be delivered.

OpenAI's fields and ours stand side by side at the top level, where `extra_body` of openai's client
puts them too. A field that could not do what it says is refused by name, never ignored.
"""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffquant.run import Request
from diffquant.serve.refusals import Refused

Format = Literal["png", "jpeg", "webp"]
Size = tuple[int | None, int | None]

LARGEST_SEED = 2**63 - 1024
PREVIEWS = 50
#: Values of OpenAI's fields that leave the choice to the server. Any other would be ignored.
NEUTRAL = {
    "quality": frozenset({"auto", "standard"}),
    "background": frozenset({"auto", "opaque"}),
    "moderation": frozenset({"auto", "low"}),
    "style": frozenset[str](),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How pictures come back: encoding, as text or as address, at once or step by step.

    events  what the names of a stream's events begin with
    """

    format: Format
    quality: int
    as_url: bool
    stream: bool
    partial_images: int
    progress: bool
    events: str = "image_generation"


class Drawing(BaseModel):
    """What pictures and videos are asked for with."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    size: Annotated[str, Field(description="WIDTHxHEIGHT in pixels, or auto")] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    true_cfg_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    max_sequence_length: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    lora: Annotated[
        str | list[str] | dict[str, float] | None,
        Field(description="LoRAs of the server to draw with: names, NAME:SCALE, or name -> scale"),
    ] = None
    user: Annotated[str, Field(max_length=256, description="named in the log")] | None = None

    @model_validator(mode="after")
    def _text_is_text(self) -> Self:
        for name in ("prompt", "negative_prompt", "user"):
            text = getattr(self, name)
            if text is not None and not _is_text(text):
                raise ValueError(f"{name} is no text: it holds control characters or half a symbol")
        if not self.prompt.strip():
            raise ValueError("prompt is empty")
        return self

    def request(self) -> Request:
        """What is to be drawn. Raises Refused for fields that contradict."""
        width, height = self._pixels()
        ours = {name: getattr(self, name) for name in _SAME_NAME}
        return Request(**ours, width=width, height=height)

    def loras(self) -> dict[str, float | None] | None:
        """Name -> scale, None where the server's own is meant; None where nothing is said."""
        if self.lora is None:
            return None
        if isinstance(self.lora, dict):
            return dict(self.lora)
        spoken = self.lora.split(",") if isinstance(self.lora, str) else self.lora
        return dict(_weighed(text.strip()) for text in spoken if text.strip())

    def _pixels(self) -> Size:
        if self.size in (None, "auto"):
            return self.width, self.height
        assert self.size is not None
        found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", self.size, re.ASCII)
        if found is None:
            raise Refused(
                400,
                f"size {self.size[:40]!r} is not WIDTHxHEIGHT or auto",
                param="size",
                code="invalid_value",
            )
        width, height = int(found[1]), int(found[2])
        for name, value, sized in (("width", self.width, width), ("height", self.height, height)):
            if value not in (None, sized):
                raise Refused(
                    400,
                    f"{name} {value} contradicts size {self.size}",
                    param=name,
                    code="invalid_value",
                )
        return width, height


class ImageBody(Drawing):
    """POST /v1/images/generations."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n: Annotated[int, Field(ge=1)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=PREVIEWS)] | None = None
    progress: Annotated[bool, Field(description="events for every step too")] | None = None
    reference: Annotated[
        bool | None, Field(description="draw with the unquantized transformer too, to compare")
    ] = None
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    style: str | None = None

    def request(self) -> Request:
        """What is to be drawn. Raises Refused for fields that contradict or would be ignored."""
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                known = ", ".join(sorted(neutral)) or "leave it out"
                raise _ignored(name, f"{name} {value!r} would be ignored; possible: {known}")
        return replace(Drawing.request(self), num_images_per_prompt=self.n or 1)

    def delivery(self) -> Delivery:
        """How to bring it. Raises Refused for fields that contradict or would be ignored."""
        kind = self.output_format or "png"
        if self.output_compression is not None and kind == "png":
            raise _ignored("output_compression", "output_compression means nothing to png")
        for name in ("partial_images", "progress"):
            if getattr(self, name) and not self.stream:
                raise _ignored(name, f"{name} would be ignored without stream")
        if self.stream and self.response_format == "url":
            raise _ignored("response_format", "a stream brings pictures as b64_json, not as url")
        compression = 90 if self.output_compression is None else self.output_compression
        return Delivery(
            format=kind,
            quality=compression,
            as_url=self.response_format == "url",
            stream=bool(self.stream),
            partial_images=self.partial_images or 0,
            progress=bool(self.progress),
        )


class EditBody(ImageBody):
    """POST /v1/images/edits but for its pictures: a form, whose values are text."""

    model_config = ConfigDict(extra="forbid", strict=False)

    def delivery(self) -> Delivery:
        """As for pictures that are drawn; a stream's events are called otherwise."""
        return replace(ImageBody.delivery(self), events="image_edit")


class VideoBody(Drawing):
    """POST /v1/videos, as JSON or as a form, whose values are text."""

    seconds: Annotated[int, Field(ge=1, le=60)] | None = None

    def request_at(self, fps: int) -> Request:
        """What is to be drawn at so many frames per second unless the body says otherwise."""
        asked = replace(self.request(), fps=self.fps or fps)
        if self.seconds is None:
            return asked
        if self.num_frames is not None:
            raise _ignored(
                "seconds", "seconds and num_frames both say how long it is; leave one out"
            )
        return replace(asked, num_frames=self.seconds * (self.fps or fps))


#: Fields that a run.Request calls the same.
_SAME_NAME = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "seed",
    "max_sequence_length",
    "num_frames",
    "fps",
)
FIELDS = tuple(ImageBody.model_fields)
EDIT_FIELDS = (*EditBody.model_fields, "image", "mask")
VIDEO_FIELDS = tuple(VideoBody.model_fields)


def _weighed(text: str) -> tuple[str, float | None]:
    """`name:0.5` -> name and scale."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, float(number)) if colon else (text, None)
    except ValueError:
        raise Refused(
            400,
            f"lora {text[:80]!r} is not NAME or NAME:SCALE",
            param="lora",
            code="invalid_value",
        ) from None


def body_name(field: str) -> str:
    """What a body calls a field of a run.Request."""
    return {"num_images_per_prompt": "n"}.get(field, field)


def _ignored(name: str, message: str) -> Refused:
    return Refused(400, message, param=name, code="ignored_parameter")


def _is_text(text: str) -> bool:
    """Whole Unicode without control characters, which tokenizers and logs stumble over."""
    if any(ord(symbol) < 32 and symbol not in "\t\n\r" for symbol in text):
        return False
    return not any(0xD800 <= ord(symbol) <= 0xDFFF for symbol in text)


def named(model: str | None, served: Any) -> None:
    """Raise Refused, 404, when a model is asked for that is not served here."""
    if model is not None and model != served:
        raise Refused(
            404,
            f"model {model[:80]!r} is not served here, {served!r} is",
            param="model",
            code="model_not_found",
        )
