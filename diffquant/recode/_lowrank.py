"""Codes beside a low-rank branch: SVDQuant's weight, alone or several as one.

Weights that are stored as one lie under each other, W [N, K]; they share s [K], which divides the
input, and D [R, K], which reads it undivided:

    W s = U (D s) + decode(codes) + what is lost

Branch and codes are taken in turn, each from what the other leaves; the round that loses least is
kept. What is lost counts by how large the input of its column is, where samples tell.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS
from diffquant.plan import Recode, Role
from diffquant.recode._codes import by_rows, codes
from diffquant.recode._smoothing import chosen

#: Rounds of taking the branch from what the last round's codes lost, unless the recode says how
#: many. The best one is kept.
ROUNDS = 3
#: Columns the random sketch has beyond the rank, and power iterations that sharpen it.
OVERSAMPLING, POWERS = 8, 2
#: Columns whose inputs are smaller than this part of the average count as if they were not.
LEAST = 0.05


def lowrank(weight_NK: Tensor, rank: int, *, powers: int = POWERS) -> tuple[Tensor, Tensor]:
    """U [N, R] and D [R, K] in bfloat16, whose product is nearly the best of that rank.

    A randomised range finder (Halko, Martinsson, Tropp 2011, algorithm 4.4) with a sketch that is the
    same in every run and touches nobody's random numbers.
    """
    n, k = weight_NK.shape
    rank = min(rank, n, k)
    width = min(rank + OVERSAMPLING, n, k)
    source = torch.Generator().manual_seed(0)
    sketch = torch.randn(k, width, generator=source).to(weight_NK.device)
    basis = torch.linalg.qr(weight_NK @ sketch).Q
    for _ in range(powers):
        basis = torch.linalg.qr(weight_NK.T @ basis).Q
        basis = torch.linalg.qr(weight_NK @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ weight_NK, full_matrices=False)
    root = values[:rank].sqrt()
    up = (basis @ left[:, :rank]) * root
    down = root[:, None] * right[:rank]
    return up.to(torch.bfloat16), down.to(torch.bfloat16)


def beside_lowrank(
    weights: Sequence[Tensor],
    recode: Recode,
    samples_MK: Tensor | None = None,
    shift: float = 0.0,
) -> list[dict[Role, Tensor]]:
    """The parts of each weight [N_i, K], D and smoothing the same in all of them.

    samples_MK  rows of true input; without them there is no smoothing
    shift       is added to the input before it is divided

    Beside the weights, which stay as they are, there are up to three float32 copies of them.
    """
    assert recode.rank is not None
    smooth = None if samples_MK is None else chosen(weights, recode, samples_MK, shift, lowrank)
    size = None if samples_MK is None else _size(samples_MK, smooth)
    rest, least = stacked(weights, smooth), float("inf")
    best: list[dict[Role, Tensor]] = []
    for _ in range(recode.rounds or ROUNDS):
        up, down = _branch(rest, recode.rank, smooth, size)
        # What the branch leaves, W s - U (D s), in the place of what the last round left.
        stacked(weights, smooth, out=rest)
        rest.addmm_(up.float(), _over(down, smooth), alpha=-1)
        found = [codes(part, recode) for part in rest.split([len(each) for each in weights])]
        rest.sub_(decoded := _decoded(found, recode, rest.shape[1]))
        lost = float(rest.norm() if size is None else rest.mul_(size).norm())
        if lost < least:
            least, best = lost, _parts(found, up, down, smooth)
        stacked(weights, smooth, out=rest).sub_(decoded)
        del decoded
    return [by_rows(parts, recode) for parts in best]


def stacked(
    weights: Sequence[Tensor], smooth: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """The weights under each other in float32, times the smoothing of their columns."""
    first = weights[0]
    rows = [len(weight) for weight in weights]
    whole = first.new_empty(sum(rows), first.shape[1], dtype=torch.float32) if out is None else out
    for part, weight in zip(whole.split(rows), weights, strict=True):
        part.copy_(weight)
    return whole if smooth is None else whole.mul_(smooth.float())


def _branch(
    rest_NK: Tensor, rank: int, smooth: Tensor | None, size: Tensor | None
) -> tuple[Tensor, Tensor]:
    """U and the D that reads the undivided input. `rest_NK` is used up."""
    up, down = lowrank(rest_NK if size is None else rest_NK.mul_(size), rank)
    wide = down.float() if size is None else down.float() / size
    return up, (wide if smooth is None else wide / smooth.float()).to(torch.bfloat16)


def _over(down: Tensor, smooth: Tensor | None) -> Tensor:
    """D as it would read the divided input."""
    return down.float() if smooth is None else down.float() * smooth.float()


def _size(samples_MK: Tensor, smooth: Tensor | None) -> Tensor:
    """How large the divided input of each column is, on average 1."""
    divided = samples_MK.float() if smooth is None else samples_MK.float() / smooth.float()
    size = divided.square().mean(0).sqrt()
    mean = size.mean()
    return torch.ones_like(size) if mean == 0 else (size / mean).clamp_(min=LEAST)


def _decoded(found: Sequence[dict[Role, Tensor]], recode: Recode, k: int) -> Tensor:
    codec = ENCODINGS.load(recode.encoding.name)
    rows = (codec.decode(parts, recode.encoding, (len(parts[Role.CODES]), k)) for parts in found)
    return next(rows) if len(found) == 1 else torch.cat(list(rows))


def _parts(
    found: Sequence[dict[Role, Tensor]], up: Tensor, down: Tensor, smooth: Tensor | None
) -> list[dict[Role, Tensor]]:
    shared = {Role.LOWRANK_DOWN: down} | ({} if smooth is None else {Role.SMOOTH: smooth})
    ups = up.split([len(parts[Role.CODES]) for parts in found])
    return [
        {**parts, **shared, Role.LOWRANK_UP: rows.contiguous()}
        for parts, rows in zip(found, ups, strict=True)
    ]
