"""What a picture looks like before it is done: the scheduler's latents, decoded.

Every pipeline hands its latents to `scheduler.step`, with what the model predicted. A flow-matching
scheduler's prediction v gives the clean picture as it is foreseen now: x0 = x - sigma * v.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def is_possible(pipeline: Any) -> bool:
    """Whether latents of this pipeline are decoded by an autoencoder for single pictures."""
    from diffusers import AutoencoderKL

    vae = getattr(pipeline, "vae", None)
    return isinstance(vae, AutoencoderKL) and hasattr(pipeline, "image_processor")


@contextmanager
def watched(pipeline: Any, seen: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `seen` with the foreseen clean latents of every step while the block runs."""
    scheduler = pipeline.scheduler
    step = scheduler.step
    signature = inspect.signature(step)

    def watching(*given: Any, **named: Any) -> Any:
        stepped = step(*given, **named)
        arguments = signature.bind(*given, **named).arguments
        seen(_foreseen(scheduler, arguments["model_output"], arguments["sample"], stepped))
        return stepped

    # An attribute of the instance hides the method, and taking it away shows the method again.
    scheduler.step = watching
    try:
        yield
    finally:
        del scheduler.step


def picture(pipeline: Any, latents: Tensor, height: int, width: int) -> Image.Image:
    """The first picture of the batch, decoded; height and width in pixels."""
    first = latents[:1]
    unpack = getattr(pipeline, "_unpack_latents", None)
    if unpack is not None:
        first = unpack(first, height, width, pipeline.vae_scale_factor)
    config = pipeline.vae.config
    first = first / config.scaling_factor + (config.shift_factor or 0.0)
    with torch.inference_mode():
        pixels = pipeline.vae.decode(first.to(pipeline.vae.dtype), return_dict=False)[0]
    shown: Image.Image = pipeline.image_processor.postprocess(pixels.float(), output_type="pil")[0]
    return shown


def _foreseen(scheduler: Any, predicted: Tensor, sample: Tensor, stepped: Any) -> Tensor:
    """x0 where the scheduler's prediction tells it, else the latents the step gave."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device, torch.float32)
        foreseen: Tensor = sample.float() - sigma * predicted.float()
        return foreseen
    given: Tensor = stepped[0]
    return given
