"""What one request may ask for, decided before the model is touched."""

import math
from collections.abc import Callable

from diffquant import run
from diffquant.device import host_memory
from diffquant.errors import UsageError
from diffquant.run import Request
from diffquant.serve.engine import Facts
from diffquant.serve.refusals import Refused, of_failure
from diffquant.serve.settings import Limits

#: Copies of the widest activation that are alive at once in an autoencoder: in, normalized, out.
ALIVE = 3
#: Bytes of one decoded pixel: three float32.
PIXEL = 12
#: Bytes that are there on any machine that serves; asking whether they are takes half a millisecond.
LITTLE = 64 * 1024 * 1024
#: What the numbers of a field count, where its name does not say.
COUNTED = {"prompt": " characters", "negative_prompt": " characters", "size": " pixels"}


def admitted(asked: Request, facts: Facts, limits: Limits) -> Request:
    """The request with every value known. Raises Refused, 400, naming the field at fault."""
    _require_meant(asked, facts)
    try:
        filled = run.fill(asked, facts.pipeline_class, facts.defaults)
    except UsageError as error:
        raise of_failure(error) from error
    filled = _with_size(filled, facts)
    _require_limits(filled, limits)
    _require_memory(filled, facts)
    return filled


def _with_size(filled: Request, facts: Facts) -> Request:
    """Pipelines without a size of their own leave it to the body or the preset."""
    if filled.width and filled.height:
        return filled
    missing = "width" if not filled.width else "height"
    raise Refused(
        400,
        f"{missing} is needed: neither the preset nor {facts.pipeline_class.__name__} has one",
        param=missing,
        code="missing_value",
    )


def _require_meant(asked: Request, facts: Facts) -> None:
    for name in asked.typed:
        if name not in facts.fields:
            raise _ignored(name, f"{name} means nothing to a {facts.pipeline_class.__name__}")
    if asked.guidance_scale is not None and facts.no_guidance:
        raise _ignored(
            "guidance_scale",
            "guidance_scale would be ignored: this model has no guidance embedding; "
            "true_cfg_scale works",
        )


def _ignored(name: str, message: str) -> Refused:
    return Refused(400, message, param=name, code="ignored_parameter")


def _require_limits(filled: Request, limits: Limits) -> None:
    width, height = filled.width or 0, filled.height or 0
    checks: tuple[tuple[str, int, int], ...] = (
        ("width", width, limits.side),
        ("height", height, limits.side),
        ("size", width * height, limits.pixels),
        ("num_inference_steps", filled.num_inference_steps or 0, limits.steps),
        ("num_frames", filled.num_frames or 1, limits.frames),
        ("n", filled.num_images_per_prompt or 1, limits.pictures),
        ("prompt", len(filled.prompt or ""), limits.prompt),
        ("negative_prompt", len(filled.negative_prompt or ""), limits.prompt),
    )
    for name, value, most in checks:
        if value > most:
            unit = COUNTED.get(name, "")
            raise Refused(
                400,
                f"{name} is {value}{unit}, at most {most} is served",
                param=name,
                code="limit_exceeded",
            )


def _require_memory(
    filled: Request, facts: Facts, available: Callable[[str], int | None] | None = None
) -> None:
    """Refuse what cannot fit even if everything but the decoded picture were free."""
    needed = decoding_bytes(filled, facts)
    if needed < LITTLE:
        return
    free = (available or available_bytes)(facts.report.device)
    if free is not None and needed > free:
        raise Refused(
            400,
            f"decoding {filled.num_images_per_prompt or 1} of {filled.width}x{filled.height} takes "
            f"at least {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            param="size",
            code="out_of_memory",
        )


def decoding_bytes(filled: Request, facts: Facts) -> int:
    """A floor of the memory that the autoencoder takes for all pictures of the request."""
    pixels = math.prod((filled.width or 0, filled.height or 0, filled.num_images_per_prompt or 1))
    return max(pixels * facts.decoded_bytes * ALIVE, pixels * (filled.num_frames or 1) * PIXEL)


def available_bytes(device: str) -> int | None:
    """Free bytes of the device now; None where only the driver would know."""
    if device == "cpu":
        return host_memory().available
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return None
