"""The regular Hadamard transform: its factor, its inverse, its groups."""

import pytest
import torch

from diffquant.plan import Rotation
from diffquant.rotation import rotated

FOUR = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2


def rotation(group: int) -> Rotation:
    return Rotation("regular_hadamard", group)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_without_a_rotation_nothing_is_touched() -> None:
    x_MK = random(2, 8)
    assert rotated(x_MK, None) is x_MK


def test_four_columns_meet_the_factor_of_the_docstring() -> None:
    assert torch.equal(rotated(torch.eye(4), rotation(4)), FOUR)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_twice_is_nothing_at_all(group: int) -> None:
    x_MK = random(3, 2 * group)
    once = rotated(x_MK, rotation(group))
    assert torch.allclose(rotated(once, rotation(group)), x_MK, atol=1e-5)
    assert not torch.allclose(once, x_MK, atol=0.1)


@pytest.mark.parametrize("group", [4, 8, 32, 128, 256])
def test_lengths_and_products_are_kept(group: int) -> None:
    x_MK, w_NK = random(3, 2 * group), random(5, 2 * group).flip(0)
    turned = rotated(x_MK, rotation(group)) @ rotated(w_NK, rotation(group)).T
    assert torch.allclose(turned, x_MK @ w_NK.T, atol=1e-3)
    assert not torch.allclose(rotated(x_MK, rotation(group)) @ w_NK.T, x_MK @ w_NK.T, atol=0.1)


def test_groups_do_not_mix() -> None:
    x_MK = random(1, 32)
    changed = x_MK.clone()
    changed[:, 16:] += 1
    first, second = (rotated(x, rotation(16))[:, :16] for x in (x_MK, changed))
    assert torch.equal(first, second)


def test_no_column_gathers_the_mean_of_its_group() -> None:
    """A Sylvester matrix would put all of a constant into one coefficient."""
    spread = rotated(torch.ones(1, 16), rotation(16)).abs()
    assert torch.allclose(spread, torch.ones(1, 16))
