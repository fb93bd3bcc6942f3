"""What is to be drawn, and what a pipeline can take of it."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

from diffquant.errors import UsageError

DEFAULT_SEED = 42
DEFAULT_FPS = 16
#: What some pipelines call a field: those of videos, one that draws sound in time with its frames,
#: and those that follow the depth or the edges of a picture.
CALLED = {
    "num_images_per_prompt": "num_videos_per_prompt",
    "fps": "frame_rate",
    "image": "control_image",
}
#: Pipelines that take several pictures for a batch of requests with one each.
_ONE_PICTURE = frozenset(
    {
        "FluxControlPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "QwenImageEditPipeline",
        "WanImageToVideoPipeline",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be drawn. None leaves a value to the next source: see `fill`.

    width, height  pixels
    seed           of the first image; image i of the request uses seed + i
    image          paths of the pictures to edit or to start from
    mask_image     path of a picture that is white where `image` is to be painted over
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int | None = None
    num_images_per_prompt: int | None = None
    max_sequence_length: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    guidance_scale_2: float | None = None
    image: tuple[str, ...] | None = None
    mask_image: str | None = None

    @property
    def typed(self) -> dict[str, Any]:
        """The values that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed per image."""
        first = DEFAULT_SEED if self.seed is None else self.seed
        return tuple(first + index for index in range(self.num_images_per_prompt or 1))


def fill(request: Request, pipeline: Any, defaults: Mapping[str, Any]) -> Request:
    """The request with every open value taken from the preset's `defaults`, else the pipeline's own.

    pipeline  or its class, which is enough to know before anything is loaded

    Raises UsageError for a typed value that this pipeline cannot take.
    """
    kind = pipeline if isinstance(pipeline, type) else type(pipeline)
    accepted = _accepted(kind)
    for name in request.typed:
        if name not in accepted:
            raise UsageError(
                f"{flag(name)} means nothing to a {kind.__name__}",
                hint=f"it takes {', '.join(flag(known) for known in sorted(accepted))}",
            )
    _require_images(request, kind)
    values = {
        item.name: _first(
            getattr(request, item.name), defaults.get(item.name), accepted.get(item.name)
        )
        for item in fields(Request)
        if item.name in accepted
    }
    return _with_guidance(replace(request, **values), request)


def rounded(asked: Request, drawn: Request) -> str | None:
    """That another size was drawn than asked: pipelines round to what their autoencoder can draw."""
    wanted = f"{asked.width or drawn.width}x{asked.height or drawn.height}"
    given = f"{drawn.width}x{drawn.height}"
    return None if wanted == given else f"{wanted} was asked for, the pipeline drew {given}"


@cache
def _accepted(kind: type) -> Mapping[str, Any]:
    """Fields of a request the pipeline's call takes, with its own default for each."""
    parameters = inspect.signature(kind.__call__).parameters
    known = {item.name for item in fields(Request)}
    accepted = {
        name: None if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in parameters.items()
        if name in known
    }
    fps = {"fps": DEFAULT_FPS} if "num_frames" in accepted else {}
    called = {
        name: parameters[theirs].default
        for name, theirs in CALLED.items()
        if theirs in parameters and name not in accepted
    }
    return {**fps, **accepted, **called, "seed": DEFAULT_SEED}


def _require_images(request: Request, kind: type) -> None:
    """A pipeline that cannot start without a picture gets one, and one only where it would take
    several for a batch; who paints over needs to know where, though its signature has a default."""
    parameters = inspect.signature(kind.__call__).parameters
    count = len(request.image or ())
    if count > 1 and kind.__name__ in _ONE_PICTURE:
        raise UsageError(
            f"a {kind.__name__} starts from one picture, and there are {count}",
            hint=f"{flag('image')} picture.png",
        )
    for name, what in (("image", "a picture"), ("mask_image", "a mask")):
        if name not in parameters and CALLED.get(name) in parameters and not request.image:
            raise UsageError(
                f"a {kind.__name__} follows a picture, and there is none",
                hint=f"{flag(name)} depth-or-edges.png",
            )
        open_ends = name in parameters and parameters[name].default is inspect.Parameter.empty
        needed = open_ends or (name in parameters and "mask_image" in parameters)
        if needed and not getattr(request, name):
            raise UsageError(
                f"a {kind.__name__} starts from {what}, and there is none",
                hint=f"{flag(name)} picture.png",
            )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _with_guidance(filled: Request, typed: Request) -> Request:
    """A negative prompt needs true guidance, and true guidance a negative prompt, if an empty one."""
    if filled.true_cfg_scale is None:
        return filled
    if filled.true_cfg_scale > 1:
        return replace(filled, negative_prompt=filled.negative_prompt or "")
    if typed.negative_prompt:
        raise UsageError(
            f"--negative-prompt has no effect at --true-cfg-scale {filled.true_cfg_scale:g}",
            hint="--true-cfg-scale 4",
        )
    return filled


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
