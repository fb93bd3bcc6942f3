"""Figures for two tensors and for two pictures, and what is wrong with one picture alone.

F frames, H and W pixels. Latents are compared over all elements as float32 on the CPU. Pictures are
compared as the 8-bit values a person sees; `mae` of pictures is in those units, 0 to 255. Wherever
the peers have a figure of the same name, the two are equal on the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from diffquant.errors import RunError, UsageError

WHITE = 255
#: MS-SSIM's weights, the finest scale first; a small picture has room for the first few only.
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11  # pixels, of SSIM's gaussian
#: Standard deviation of 8-bit values below which a picture shows nothing.
FLAT = 2.0
#: Correlation of neighbouring pixels below which a picture is noise; photographs have above 0.9.
NOISE = 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a tensor is from its reference; all but the first two in the tensor's own unit.

    relative_l2  ‖candidate - reference‖ / ‖reference‖
    l2           ‖candidate - reference‖
    """

    cosine: float
    relative_l2: float
    mae: float
    mse: float
    rmse: float
    max_abs: float
    l2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How alike two pictures, or two videos frame by frame (means), are.

    psnr_db  infinite for identical ones
    ms_ssim  over as many scales as the size has room for; None below 22 pixels
    mae      0 to 255
    frames   PSNR of each frame of a video, in decibels
    flicker  mean difference of how the two change from frame to frame, 0 to 255; None for pictures
    """

    psnr_db: float
    ssim: float
    ms_ssim: float | None
    mae: float
    frames: tuple[float, ...] = ()
    flicker: float | None = None


def distance(reference: Tensor, candidate: Tensor) -> Distance:
    """Raises RunError where the shapes differ: there is nothing to compare."""
    if reference.shape != candidate.shape:
        raise RunError(
            f"a tensor of shape {list(candidate.shape)} is compared with one of "
            f"{list(reference.shape)}",
            hint="both sides need the same --width, --height and --num-frames",
        )
    left, right = (
        side.detach().to("cpu", torch.float32).flatten() for side in (reference, candidate)
    )
    difference = right - left
    norm, l2 = float(left.norm()), float(difference.norm())
    mse = float(difference.square().mean())
    return Distance(
        cosine=_cosine(left, right),
        relative_l2=l2 / norm if norm else (inf if l2 else 0.0),
        mae=float(difference.abs().mean()),
        mse=mse,
        rmse=mse**0.5,
        max_abs=float(difference.abs().max()),
        l2=l2,
    )


def per_step(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> tuple[Distance, ...]:
    """Of two trajectories, step by step. Raises RunError where one has more steps."""
    if len(reference) != len(candidate):
        raise RunError(
            f"a trajectory of {len(candidate)} steps is compared with one of {len(reference)}",
            hint="both sides need the same --num-inference-steps",
        )
    return tuple(distance(left, right) for left, right in zip(reference, candidate, strict=True))


def likeness(reference_F3HW: Tensor, candidate_F3HW: Tensor) -> Likeness:
    """Of two pictures (F = 1) or videos, uint8. Raises RunError where sizes or frames differ."""
    if reference_F3HW.shape != candidate_F3HW.shape:
        raise RunError(
            f"{_told(candidate_F3HW)} are compared with {_told(reference_F3HW)}",
            hint="both sides need the same --width, --height and --num-frames",
        )
    functions = _image_functions()
    left, right = reference_F3HW.float(), candidate_F3HW.float()
    whole = float(WHITE)
    frames = tuple(
        float(functions.peak_signal_noise_ratio(right[i], left[i], data_range=whole))
        for i in range(len(left))
    )
    shown = {"data_range": whole}
    alike = float(functions.structural_similarity_index_measure(right, left, **shown))
    return Likeness(
        psnr_db=float(functions.peak_signal_noise_ratio(right, left, **shown)),
        ssim=alike,
        ms_ssim=_ms_ssim(left, right, functions),
        mae=float((left - right).abs().mean()),
        frames=frames if len(frames) > 1 else (),
        flicker=float((left.diff(dim=0) - right.diff(dim=0)).abs().mean())
        if len(left) > 1
        else None,
    )


def flaw(picture_3HW: Tensor) -> str | None:
    """What makes a uint8 picture worthless whatever it is compared with, or None."""
    values = picture_3HW.float()
    low, high = int(values.min()), int(values.max())
    if low == high:
        return {0: "black", WHITE: "white"}.get(low, f"one colour ({low})")
    if float(values.std()) < FLAT:
        return "almost one colour"
    return "noise" if _neighbours_agree(values.mean(0)) < NOISE else None


def as_frames(pixels: Tensor) -> Tensor:
    """Pixels [..., 3, H, W] between 0 and 1, one picture or one video -> uint8 [F, 3, H, W].

    Rounded as diffusers rounds; what is not finite becomes black.
    """
    frames = pixels.detach().to("cpu", torch.float32).reshape(-1, *pixels.shape[-3:])
    return (frames.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * WHITE).round().to(torch.uint8)


def _cosine(left: Tensor, right: Tensor) -> float:
    """1 for two zero tensors, 0 when exactly one is zero."""
    norms = float(left.norm()), float(right.norm())
    if not all(norms):
        return 1.0 if not any(norms) else 0.0
    return float(left @ right) / (norms[0] * norms[1])


def _ms_ssim(left: Tensor, right: Tensor, functions: Any) -> float | None:
    """With the first scales whose coarsest picture still holds the window, weights summing to 1."""
    side = min(left.shape[-2:])
    room = [weight for index, weight in enumerate(SCALES) if side > (WINDOW - 1) * 2**index]
    if len(room) < 2:
        return None
    betas = tuple(weight / sum(room) for weight in room)
    measure = functions.multiscale_structural_similarity_index_measure
    return float(measure(right, left, data_range=float(WHITE), betas=betas))


def _neighbours_agree(grey_HW: Tensor) -> float:
    """Correlation of pixels with those beside and below, the mean of both directions."""
    pairs = ((grey_HW[:, 1:], grey_HW[:, :-1]), (grey_HW[1:], grey_HW[:-1]))
    return sum(_correlation(one, other) for one, other in pairs) / 2


def _correlation(one: Tensor, other: Tensor) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = float(one.norm() * other.norm())
    return float((one * other).sum()) / scale if scale else 1.0


def _told(frames: Tensor) -> str:
    count, _, height, width = frames.shape
    return f"{count} pictures of {width}x{height}"


def _image_functions() -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise UsageError(
            "comparing pictures needs torchmetrics, which is not installed",
            hint="pip install 'diffquant[compare]'",
        ) from error
    return image
