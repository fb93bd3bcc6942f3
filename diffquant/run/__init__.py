"""A request and a pipeline -> pictures that are checked, saved and can be drawn again.

B images of one request, image i drawn with seed + i.

  _request   what is to be drawn
  _calling   the pipeline's call
  _watching  finite values, step by step and layer by layer
  _result    what came of it
  _files     names, records, PNG and video files
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffquant.errors import NonFiniteError, RunError, UsageError
from diffquant.run._calling import called, draw, pixels_of
from diffquant.run._files import METADATA_KEY, read_metadata, require_name, save, slug
from diffquant.run._request import DEFAULT_FPS, DEFAULT_SEED, Request, fill, rounded
from diffquant.run._result import Result
from diffquant.run._watching import LatentsWentBad, OnStep, Watch, blame, finite
from diffquant.sound import sounds
from diffquant.video import Sound

__all__ = [
    "DEFAULT_FPS",
    "DEFAULT_SEED",
    "METADATA_KEY",
    "OnStep",
    "Request",
    "Result",
    "draw",
    "fill",
    "generate",
    "generate_together",
    "read_metadata",
    "recorded",
    "require_name",
    "rounded",
    "save",
    "slug",
    "versions",
]

VIDEO_AXES = 5  # videos are [B, F, 3, H, W], pictures [B, 3, H, W]
MORE_RANGE = (
    "--dtype float32 has the range; or leave that layer as it is: --quantization-ignored-layers NAME, "
    "or a preset that keeps it (diffquant presets)"
)


def generate(pipeline: Any, request: Request, on_step: OnStep | None = None) -> Result:
    """Draw the pictures. `on_step(done, of)` is called after every denoising step.

    Raises NonFiniteError where latents, pixels or sound are not finite, naming the step and the
    first layer that went wrong, and RunError for a picture of one colour.
    """
    return generate_together(pipeline, [request], on_step)[0]


def generate_together(
    pipeline: Any, requests: Sequence[Request], on_step: OnStep | None = None
) -> tuple[Result, ...]:
    """Requests that differ in nothing but words and seeds, drawn as one batch: a result each.

    Raises as `generate` does; a batch that goes bad does not say whose fault it was.
    """
    first = requests[0]
    if not all(request.prompt for request in requests):
        raise UsageError("there is no prompt", hint="--prompt 'red apple'")
    steps = first.num_inference_steps or 0
    watch = Watch(steps, on_step)
    started = time.perf_counter()
    try:
        drawn = called(pipeline, first, watch, requests[1:])
    except LatentsWentBad as bad:
        raise NonFiniteError(
            f"latents are not finite after step {bad.step + 1} of {steps}; "
            f"{blame(pipeline, requests)}",
            hint=MORE_RANGE,
        ) from None
    seconds = time.perf_counter() - started
    pixels, heard = pixels_of(pipeline, drawn), sounds(pipeline, drawn)
    for what, values in {"pixels are": (pixels,), "the sound is": _waves(heard)}.items():
        if not finite(values):
            raise NonFiniteError(f"{what} not finite; {blame(pipeline, requests)}", hint=MORE_RANGE)
    for index, picture in enumerate(pixels):
        _require_picture(picture, index)
    shares = pixels.split([len(request.seeds) for request in requests])
    voices = iter(heard)
    return tuple(
        replace(
            _result(request, share, seconds, watch.seconds),
            sounds=tuple(itertools.islice(voices, len(share))),
        )
        for request, share in zip(requests, shares, strict=True)
    )


def _waves(heard: Sequence[Sound]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(sound.samples) for sound in heard)


def _result(
    request: Request, pixels: Tensor, seconds: float, step_seconds: Sequence[float]
) -> Result:
    height, width = pixels.shape[-2:]
    is_video = pixels.dim() == VIDEO_AXES
    frames = pixels.shape[1] if is_video else request.num_frames
    return Result(
        request=replace(request, height=height, width=width, num_frames=frames),
        images=() if is_video else tuple(map(_image, pixels)),
        videos=tuple(tuple(map(_image, clip)) for clip in pixels) if is_video else (),
        seconds=seconds,
        step_seconds=tuple(step_seconds),
    )


def recorded(result: Result, *, flags: Mapping[str, Any], report: Mapping[str, Any]) -> Result:
    """The result with everything needed to draw it again.

    flags   what was typed about models and the run, by field name
    report  of the loaded pipeline: plans, digests, the choice per layer
    """
    record = {
        "request": result.request.typed,
        "flags": dict(flags),
        "report": dict(report),
        "versions": versions(),
        "seconds": round(result.seconds, 3),
        **({"sound": result.sounds[0].to_json()} if result.sounds else {}),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return replace(result, record=record)


def versions() -> dict[str, str]:
    """Versions of what decides the bits of a picture, and the number of threads."""
    return {**_installed(), "threads": str(torch.get_num_threads())}


@cache
def _installed() -> Mapping[str, str]:
    """Looked up once: reading the metadata takes two milliseconds, of every picture."""
    from importlib.metadata import PackageNotFoundError, version

    names = ("diffquant", "torch", "diffusers", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _require_picture(picture: Tensor, index: int) -> None:
    if picture.max() == picture.min():
        raise RunError(
            f"picture {index + 1} has one colour only ({picture.max().item():.3f}) and is not saved",
            hint="compare with --numerics faithful, or look at the weights: diffquant inspect SOURCE",
        )


def _image(picture: Tensor) -> Image.Image:
    """[3, H, W] between 0 and 1 -> 8 bits, rounded exactly as diffusers does."""
    values = picture.permute(1, 2, 0).float().cpu().numpy()
    return Image.fromarray((values * 255).round().astype("uint8"))
