"""A request -> the call of a diffusers pipeline -> pixels as they come."""

import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffquant.errors import RunError, UsageError
from diffquant.run._request import CALLED, Request, flag

#: Fields that are not arguments of a pipeline's call under their own name.
_OURS = frozenset({"seed"})


def draw(
    pipeline: Any,
    request: Request,
    watch: Callable[..., dict[str, Any]],
    *,
    beside: Sequence[Request] = (),
) -> Tensor:
    """Pixels [B, 3, H, W], or [B, F, 3, H, W] of videos, between 0 and 1, as they come: unchecked.

    watch   diffusers' `callback_on_step_end`: called with pipeline, step, timestep and the latents
    beside  requests of other words and seeds, drawn in the same batch behind this one
    """
    return pixels_of(pipeline, called(pipeline, request, watch, beside))


def called(
    pipeline: Any, request: Request, watch: Callable[..., dict[str, Any]], beside: Sequence[Request]
) -> Any:
    """What the pipeline's call gives, with arguments as `draw` takes them."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    arguments = {
        **{name: value for name, value in request.typed.items() if name not in _OURS},
        # On the CPU, so that a seed means the same noise on every device.
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
        "callback_on_step_end": watch,
        "output_type": "pt",
        **_opened(request),
        **(_batched([request, *beside]) if beside else {}),
    }
    if request.width and request.height:
        # Kontext scales what was asked for to this area, a megapixel unless told otherwise.
        arguments["max_area"] = request.width * request.height
    for name, theirs in CALLED.items():
        if name in arguments and name not in accepted:
            arguments[theirs] = arguments.pop(name)
    try:
        with torch.inference_mode():
            return pipeline(**{name: arguments[name] for name in arguments if name in accepted})
    except ValueError as error:
        if not _from_input_check(error):
            raise
        raise UsageError(f"{type(pipeline).__name__} refuses: {error}") from error


def pixels_of(pipeline: Any, drawn: Any) -> Tensor:
    """The pixels in what a pipeline's call gave. Raises RunError where there are none."""
    made: Tensor | None = getattr(drawn, "images", getattr(drawn, "frames", None))
    if made is None:
        raise RunError(
            f"{type(pipeline).__name__} makes neither pictures nor videos, and only those are saved"
        )
    return made


def _batched(requests: Sequence[Request]) -> dict[str, Any]:
    """Arguments of a batch: one prompt and one generator per picture."""
    alone = [(request, seed) for request in requests for seed in request.seeds]
    negative = [request.negative_prompt for request, _ in alone]
    return {
        "prompt": [request.prompt for request, _ in alone],
        **({"negative_prompt": negative} if negative[0] is not None else {}),
        "num_images_per_prompt": 1,
        "generator": [torch.Generator("cpu").manual_seed(seed) for _, seed in alone],
    }


def _opened(request: Request) -> dict[str, Any]:
    """The pictures of the request: one alone, several as a list."""
    pictures = [_picture(path, "image") for path in request.image or ()]
    opened: dict[str, Any] = {}
    if pictures:
        opened["image"] = pictures[0] if len(pictures) == 1 else pictures
    if request.mask_image is not None:
        opened["mask_image"] = _picture(request.mask_image, "mask_image")
    return opened


def _picture(path: str, name: str) -> Image.Image:
    """As it is meant to be seen: turned as its EXIF says, without transparency."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"{flag(name)} {path!r}: there is no such file") from error
    except OSError as error:
        raise UsageError(f"{flag(name)} {path!r} is not a picture") from error


def _from_input_check(error: ValueError) -> bool:
    """Whether diffusers raised it while it looked at what was asked for."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "check_inputs" for frame in frames)
