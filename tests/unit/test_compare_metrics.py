"""Figures of tensors and pictures, held against the formulas they are named for."""

from math import inf, isclose, log10

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, l1_loss, mse_loss

from diffquant.compare.metrics import as_frames, distance, flaw, likeness, per_step
from diffquant.errors import RunError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(*, shift: int = 0, height: int = 64, width: int = 64) -> Tensor:
    """uint8 [1, 3, H, W] with soft edges, as pictures have."""
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grey = 128 + 100 * torch.sin((down + shift) / 9) * torch.cos(right / 7)
    return grey.round().to(torch.uint8).expand(1, 3, height, width).contiguous()


def test_a_step_has_the_figures_of_the_peer_on_the_same_latents() -> None:
    left, right = noise(4, 16, seed=1), noise(4, 16, seed=2)
    found = distance(left, right)
    flat = (left.flatten(), right.flatten())
    assert isclose(found.cosine, float(cosine_similarity(*flat, dim=0)), abs_tol=1e-6)
    assert isclose(found.mae, float(l1_loss(right, left)), rel_tol=1e-6)
    assert isclose(found.mse, float(mse_loss(right, left)), rel_tol=1e-6)
    assert isclose(found.rmse, found.mse**0.5)
    assert isclose(found.max_abs, float((right - left).abs().amax()), rel_tol=1e-6)
    assert isclose(found.l2, float(torch.linalg.norm(right - left)), rel_tol=1e-6)
    assert isclose(found.relative_l2, found.l2 / float(torch.linalg.norm(left)), rel_tol=1e-6)


def test_two_zero_latents_are_alike_and_one_is_not() -> None:
    zero, other = torch.zeros(8), torch.ones(8)
    assert distance(zero, zero).cosine == 1.0
    assert distance(zero, zero).relative_l2 == 0.0
    assert distance(other, zero).cosine == distance(zero, other).cosine == 0.0
    assert distance(zero, other).relative_l2 == inf


def test_exchanged_sides_change_the_relative_figure_only() -> None:
    left, right = noise(32), 2 * noise(32)
    there, back = distance(left, right), distance(right, left)
    assert there.mae == back.mae
    assert isclose(there.relative_l2, 2 * back.relative_l2, rel_tol=1e-6)


def test_what_has_another_shape_is_not_compared() -> None:
    with pytest.raises(RunError, match=r"\[3\] is compared with one of \[4\]"):
        distance(noise(4), noise(3))
    with pytest.raises(RunError, match="2 steps is compared with one of 1"):
        per_step([noise(4)], [noise(4), noise(4)])
    with pytest.raises(RunError, match="1 pictures of 64x32 are compared with 1 pictures of 64x64"):
        likeness(picture(), picture(height=32))


def test_psnr_is_that_of_8_bit_values() -> None:
    left, right = picture(), picture(shift=1)
    mse = float((left.float() - right.float()).square().mean())
    assert isclose(likeness(left, right).psnr_db, 20 * log10(255) - 10 * log10(mse), rel_tol=1e-5)


def test_identical_pictures_are_infinitely_alike_and_shifted_ones_are_not() -> None:
    same, other = likeness(picture(), picture()), likeness(picture(), picture(shift=3))
    assert (same.psnr_db, same.mae) == (inf, 0.0)
    assert isclose(same.ssim, 1.0, abs_tol=1e-6)
    assert same.ms_ssim is not None
    assert isclose(same.ms_ssim, 1.0, abs_tol=1e-6)
    assert other.ssim < 0.99
    assert other.flicker is None


def test_a_picture_too_small_for_two_scales_has_no_ms_ssim() -> None:
    assert likeness(picture(height=20), picture(height=20)).ms_ssim is None
    assert likeness(picture(height=21), picture(height=21)).ms_ssim is not None


def test_flicker_sees_a_frame_that_jumps_and_not_a_video_that_is_brighter() -> None:
    still = torch.cat([picture()] * 4)
    brighter, jumping = still + 5, still.clone()
    jumping[2] += 5
    assert likeness(still, brighter).flicker == 0.0
    jump = likeness(still, jumping)
    assert isclose(jump.flicker or 0, 10 / 3, rel_tol=1e-5)
    assert [value == inf for value in jump.frames] == [True, True, False, True]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.zeros(3, 32, 32), "black"),
        (torch.full((3, 32, 32), 255), "white"),
        (torch.full((3, 32, 32), 7), "one colour (7)"),
        (100 + noise(3, 32, 32).sign(), "almost one colour"),
        (128 + 60 * noise(3, 32, 32).clamp(-2, 2), "noise"),
        (picture()[0], None),
    ],
)
def test_a_worthless_picture_is_named(values: Tensor, said: str | None) -> None:
    assert flaw(values.to(torch.uint8)) == said


def test_pixels_are_rounded_as_diffusers_does_and_nan_is_black() -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0, torch.nan]).expand(1, 3, 2, 4)
    assert as_frames(pixels)[0, 0, 0].tolist() == [0, 128, 255, 0]
    assert as_frames(torch.rand(1, 5, 3, 8, 8)).shape == (5, 3, 8, 8)
