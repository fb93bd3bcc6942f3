"""What every layout promises. A new file in `layouts/` is tested on arrival."""

import pytest
import torch
from torch import Tensor

from diffquant.errors import PlanError
from diffquant.layouts import LAYOUTS
from diffquant.plan import Role

WRITABLE = [name for name in LAYOUTS.names() if LAYOUTS.load(name).redo is not None]
# Parts of a weight with 256 rows and 512 columns: role, logical shape, canonical tensor.
PARTS: list[tuple[Role, tuple[int, ...], Tensor]] = [
    (Role.CODES, (256, 512), torch.arange(256 * 256).remainder(251).to(torch.uint8).view(256, 256)),
    (
        Role.BLOCK_SCALE,
        (256, 32),
        (torch.arange(256 * 32.0) % 97).to(torch.float8_e4m3fn).view(256, 32),
    ),
    (Role.BLOCK_SCALE, (256, 8), torch.arange(256 * 8.0).view(256, 8).bfloat16()),
    (Role.LOWRANK_DOWN, (32, 512), torch.arange(32 * 512.0).view(32, 512)),
    (Role.BIAS, (256,), torch.arange(256.0)),
]


def places(name: str) -> list[tuple[Role, tuple[int, ...], Tensor, Tensor]]:
    """The parts this layout can store, each with what it stores."""
    order, found = LAYOUTS.load(name), []
    assert order.redo is not None
    for role, shape, part in PARTS:
        try:
            found.append((role, shape, part, order.redo(part, role, shape, ())))
        except PlanError:
            continue  # not every part has a place in every order
    return found


def sorted_nibbles(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(torch.uint8).reshape(-1)
    return torch.cat((flat & 15, flat >> 4)).sort().values


@pytest.mark.parametrize("name", LAYOUTS.names())
def test_its_docstring_says_where_things_lie(name: str) -> None:
    module = __import__(f"{LAYOUTS.package}.{name}", fromlist=["LAYOUT"])
    assert len((module.__doc__ or "").splitlines()) > 2


@pytest.mark.parametrize("name", WRITABLE)
def test_undoing_what_was_done_gives_the_part_back(name: str) -> None:
    order, stored_parts = LAYOUTS.load(name), places(name)
    assert stored_parts
    for role, shape, part, stored in stored_parts:
        back = order.undo(stored, role, shape, ())
        assert back.dtype == part.dtype
        assert torch.equal(back.float(), part.float())


@pytest.mark.parametrize("name", WRITABLE)
def test_no_number_is_changed_only_moved(name: str) -> None:
    for _, _, part, stored in places(name):
        assert torch.equal(sorted_nibbles(stored), sorted_nibbles(part))


@pytest.mark.parametrize("name", WRITABLE)
def test_a_stored_tensor_of_another_size_is_refused(name: str) -> None:
    order = LAYOUTS.load(name)
    for role, shape, _, stored in places(name):
        half = stored[: stored.shape[0] // 2]
        with pytest.raises(PlanError):
            order.undo(half, role, shape, ())
