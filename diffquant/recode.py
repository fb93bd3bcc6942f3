"""Pieces of a plan -> encoded parts, one layer at a time: what `Piece.recode` asks for.

Nothing here knows an encoding by name. A weight is N x K; a low-rank branch U [N, R], D [R, K] takes
what quantizing loses, W = U D + decode(encode(W - U D)), and no activations are looked at.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS, Recipe
from diffquant.errors import PlanError
from diffquant.pieces import canonical, decoded
from diffquant.plan import DENSE, Piece, Plan, Recode, Role
from diffquant.tensors import Weights

#: Rounds of taking the branch from what the last round's codes lost. The best one is kept.
ROUNDS = 3
#: Columns the random sketch has beyond the rank, and power iterations that sharpen it.
OVERSAMPLING, POWERS = 8, 2


class Encoder:
    """Encodes the pieces of one plan, and measures what siblings share once.

    Host memory: the layer at hand, dense and encoded; siblings are measured in their mapped files.
    """

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self._weights = weights
        self._largest: dict[str, Tensor] = {}
        self._siblings: dict[str, list[Piece]] = {}
        for piece in (piece for layer in plan.layers for piece in layer.pieces):
            key = None if piece.recode is None else piece.recode.shared_amax
            if key is not None:
                self._siblings.setdefault(key, []).append(piece)

    def parts(self, piece: Piece, held: Mapping[Role, Tensor]) -> dict[Role, Tensor]:
        """The parts the piece multiplies with: what is stored, or what its recode makes of it."""
        if piece.recode is None:
            return dict(held)
        weight_NK = _weight(piece, held)
        made = encoded(weight_NK, piece.recode, amax=self._shared_amax(piece.recode))
        if Role.BIAS in held:
            made[Role.BIAS] = held[Role.BIAS]
        _give_back()
        return made

    def _shared_amax(self, recode: Recode) -> Tensor | None:
        key = recode.shared_amax
        if key is None:
            return None
        if key not in self._largest:
            found = [_amax(_weight(it, canonical(it, self._weights))) for it in self._siblings[key]]
            self._largest[key] = torch.stack(found).amax()
        return self._largest[key]


def encoded(weight_NK: Tensor, recode: Recode, *, amax: Tensor | None = None) -> dict[Role, Tensor]:
    """Parts of `recode.roles` for a dense weight.

    amax  largest magnitude of the weights that share the tensor scale, () in their dtype

    Raises PlanError when the encoding cannot be written.
    """
    if recode.rank is not None:
        return _beside_lowrank(weight_NK, recode)
    return _codes(
        weight_NK, recode, None if amax is None else _scale_for(amax.to(weight_NK.device), recode)
    )


def lowrank(weight_NK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
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
    for _ in range(POWERS):
        basis = torch.linalg.qr(weight_NK.T @ basis).Q
        basis = torch.linalg.qr(weight_NK @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ weight_NK, full_matrices=False)
    root = values[:rank].sqrt()
    up = (basis @ left[:, :rank]) * root
    down = root[:, None] * right[:rank]
    return up.to(torch.bfloat16), down.to(torch.bfloat16)


def _beside_lowrank(weight_NK: Tensor, recode: Recode) -> dict[Role, Tensor]:
    """Branch and codes, each taken from what the other leaves; the round that loses least.

    Beside the weight, which stays as it is, there are up to three float32 copies of it.
    """
    assert recode.rank is not None
    codec = ENCODINGS.load(recode.encoding.name)
    shape_NK = (weight_NK.shape[0], weight_NK.shape[1])
    rest, least = weight_NK.to(torch.float32, copy=True), float("inf")
    best: dict[Role, Tensor] = {}
    for _ in range(ROUNDS):
        up, down = lowrank(rest, recode.rank)
        # What the branch leaves, W - U D, in the place of what the last round left.
        target = rest.copy_(weight_NK).addmm_(up.float(), down.float(), alpha=-1)
        parts = _codes(target, recode, None)
        held = codec.decode(parts, recode.encoding, shape_NK)
        lost = float(target.sub_(held).norm())
        if lost < least:
            least, best = lost, {**parts, Role.LOWRANK_UP: up, Role.LOWRANK_DOWN: down}
        rest.copy_(weight_NK).sub_(held)
    return best


def _codes(weight_NK: Tensor, recode: Recode, scale: Tensor | None) -> dict[Role, Tensor]:
    codec = ENCODINGS.load(recode.encoding.name)
    if codec.encode is None:
        raise PlanError(f"nothing writes {recode.encoding}")
    recipe = Recipe(granularity=recode.granularity, group=recode.group, scale=scale)
    return codec.encode(weight_NK, recode.encoding, recipe)


def _scale_for(amax: Tensor, recode: Recode) -> Tensor:
    """The tensor scale the codec itself would take from a weight of that largest magnitude."""
    witness = amax.new_zeros(1, recode.group or 16)
    witness[0, 0] = amax
    return _codes(witness, recode, None)[Role.TENSOR_SCALE]


def _give_back() -> None:
    """Let the system have what was freed: glibc keeps blocks below 32 MB between those that live on,
    and a model of such layers would come to hold three times what it needs."""
    if (trim := _trimmer()) is not None:
        trim(0)


@cache
def _trimmer() -> Callable[[int], int] | None:
    """glibc's malloc_trim, where there is one."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, "malloc_trim", None)


def _weight(piece: Piece, held: Mapping[Role, Tensor]) -> Tensor:
    """The stored weight, in its own dtype if it is dense."""
    return held[Role.CODES] if piece.encoding == DENSE else decoded(piece, dict(held))


def _amax(weight_NK: Tensor) -> Tensor:
    low, high = weight_NK.aminmax()
    return torch.maximum(-low, high).cpu()
