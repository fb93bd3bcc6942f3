"""Pieces of a plan -> encoded parts, one stored weight at a time: what `Piece.recode` asks for.

Nothing here knows an encoding by name. A weight is N x K; a low-rank branch U [N, R], D [R, K] takes
what quantizing loses, W = U D + decode(encode(W - U D)). Where the plan has samples of a layer's
input its smoothing is chosen by them; otherwise nothing but the weight is looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS
from diffquant.heap import give_back
from diffquant.pieces import canonical, decoded
from diffquant.plan import DENSE, Piece, Plan, Recode, Role
from diffquant.recode._codes import codes
from diffquant.recode._inputs import input_scale
from diffquant.recode._lowrank import beside_lowrank, lowrank
from diffquant.tensors import Weights

__all__ = ["Encoder", "encoded", "input_scale", "lowrank", "sketched"]


class Encoder:
    """Encodes the pieces of one plan, and measures what siblings share once.

    Host memory: the stored weight at hand, dense and encoded; siblings that share no more than a
    scale are measured in their mapped files.
    """

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self._weights = weights
        self._largest: dict[str, Tensor] = {}
        self._siblings: dict[str, list[Piece]] = {}
        self._fused: dict[str, list[Piece]] = {}
        self._made: dict[str, _Group] = {}
        for piece in (piece for layer in plan.layers for piece in layer.pieces):
            if piece.recode is not None and piece.recode.shared_amax is not None:
                self._siblings.setdefault(piece.recode.shared_amax, []).append(piece)
            if piece.recode is not None and piece.recode.fused is not None:
                self._fused.setdefault(piece.recode.fused, []).append(piece)

    def parts(self, piece: Piece, held: Mapping[Role, Tensor]) -> dict[Role, Tensor]:
        """The parts the piece multiplies with: what is stored, or what its recode makes of it."""
        recode = piece.recode
        if recode is None:
            return dict(held)
        if recode.fused is not None:
            made = self._group(recode.fused, piece, held)
        elif recode.rank is not None:
            made = beside_lowrank(
                [_weight(piece, held)], recode, self._samples(piece), piece.shift
            )[0]
        else:
            made = encoded(_weight(piece, held), recode, amax=self._shared_amax(recode))
        if (bias := self._bias(piece, held, made)) is not None:
            made[Role.BIAS] = bias
        if recode.activation is not None and recode.input_amax is not None:
            made[Role.INPUT_SCALE] = input_scale(recode.activation, recode.input_amax)
        give_back()
        return made

    def _group(self, key: str, piece: Piece, held: Mapping[Role, Tensor]) -> dict[Role, Tensor]:
        """One member of what is encoded as one weight; the others wait until they are asked for."""
        if key not in self._made:
            for done in [name for name, group in self._made.items() if group.is_done]:
                del self._made[done]
            members, device = self._fused[key], held[Role.CODES].device
            weights = [
                _weight(each, held if each == piece else canonical(each, self._weights)).to(device)
                for each in members
            ]
            assert piece.recode is not None
            found = beside_lowrank(weights, piece.recode, self._samples(piece), piece.shift)
            self._made[key] = _Group(members, found)
        return self._made[key].of(piece)

    def _bias(
        self, piece: Piece, held: Mapping[Role, Tensor], made: Mapping[Role, Tensor]
    ) -> Tensor | None:
        """The stored bias, or the one the recode asks for: less what the shifted input adds, and with
        what the average input loses, where samples tell; from zero where nothing is stored."""
        recode, stored = piece.recode, held.get(Role.BIAS)
        if recode is None or Role.BIAS not in recode.roles:
            return stored
        weight_NK, shifted = _dense(piece, made)
        bias = -shifted if stored is None else stored.float() - shifted
        if (samples_MK := self._samples(piece)) is not None:
            average = samples_MK.to(bias.device).float().mean(0)
            bias += _weight(piece, held).float() @ average - weight_NK @ average
        return _as_stored(bias, recode)

    def _samples(self, piece: Piece) -> Tensor | None:
        """Rows of the piece's own columns of its layer's input."""
        assert piece.recode is not None
        ref = piece.recode.samples
        if ref is None:
            return None
        return self._weights.tensor(ref.file, ref.name)[:, piece.cols.as_slice()]

    def _shared_amax(self, recode: Recode) -> Tensor | None:
        key = recode.shared_amax
        if key is None:
            return None
        if key not in self._largest:
            found = [_amax(_weight(it, canonical(it, self._weights))) for it in self._siblings[key]]
            self._largest[key] = torch.stack(found).amax()
        return self._largest[key]


class _Group:
    """Encoded members of one stored weight."""

    def __init__(self, members: Sequence[Piece], found: Sequence[dict[Role, Tensor]]) -> None:
        self._found = dict(zip(members, found, strict=True))
        self._waiting = set(members)

    def of(self, piece: Piece) -> dict[Role, Tensor]:
        self._waiting.discard(piece)
        return dict(self._found[piece])

    @property
    def is_done(self) -> bool:
        return not self._waiting


def encoded(weight_NK: Tensor, recode: Recode, *, amax: Tensor | None = None) -> dict[Role, Tensor]:
    """Parts of `recode.roles` for a dense weight by itself, bias excepted.

    amax  largest magnitude of the weights that share the tensor scale, () in their dtype

    Raises PlanError when the encoding cannot be written.
    """
    if recode.rank is not None:
        return beside_lowrank([weight_NK], recode)[0]
    scale = None if amax is None else _scale_for(amax.to(weight_NK.device), recode)
    return codes(weight_NK, recode, scale)


def sketched(piece: Piece) -> dict[Role, Tensor]:
    """Shapes and dtypes of what the piece's recode makes, computed without data."""
    recode = piece.recode
    assert recode is not None
    alike = replace(recode, fused=None, shared_amax=None, bias_offsets=())
    alike = replace(alike, samples=None, input_amax=None)
    return dict(_sketch(len(piece.out), len(piece.cols), alike))


@lru_cache(maxsize=64)
def _sketch(n: int, k: int, recode: Recode) -> Mapping[Role, Tensor]:
    """Cached, because a model repeats its blocks and operators on meta tensors are slow."""
    weight = torch.empty(n, k, device="meta")
    made = codes(weight, replace(recode, rank=None))
    rank = min(recode.rank or 0, n, k)
    wide = torch.float32 if recode.scale_dtype is None else getattr(torch, recode.scale_dtype)
    others = {
        Role.LOWRANK_UP: ((n, rank), torch.bfloat16),
        Role.LOWRANK_DOWN: ((rank, k), torch.bfloat16),
        Role.SMOOTH: ((k,), torch.bfloat16),
        Role.CHANNEL_SCALE: ((n,), wide),
        Role.BIAS: ((n,), wide),
        Role.INPUT_SCALE: ((), torch.float32),
    }
    for role in recode.roles & others.keys() - made.keys():
        shape, dtype = others[role]
        made[role] = torch.empty(shape, dtype=dtype, device="meta")
    return {role: made[role] for role in recode.roles}


def _scale_for(amax: Tensor, recode: Recode) -> Tensor:
    """The tensor scale the codec itself would take from a weight of that largest magnitude."""
    witness = amax.new_zeros(1, recode.group or 16)
    witness[0, 0] = amax
    return codes(witness, recode)[Role.TENSOR_SCALE]


def _as_stored(bias: Tensor, recode: Recode) -> Tensor:
    """The bias as it comes back from where it was rounded with the dialect's offsets on it."""
    if recode.scale_dtype is None:
        return bias
    dtype = getattr(torch, recode.scale_dtype)
    for offset in recode.bias_offsets:
        bias[offset.rows.as_slice()] -= offset.value
    bias = bias.to(dtype).float()
    for offset in recode.bias_offsets:
        bias[offset.rows.as_slice()] += offset.value
    return bias.to(dtype)


def _dense(piece: Piece, made: Mapping[Role, Tensor]) -> tuple[Tensor, Tensor]:
    """What the made parts multiply the undivided input with, [N, K], and what its shift adds [N]."""
    recode = piece.recode
    assert recode is not None
    codec, shape_NK = ENCODINGS.load(recode.encoding.name), (len(piece.out), len(piece.cols))
    weight_NK = codec.decode(made, recode.encoding, shape_NK)
    if Role.SMOOTH in made:
        weight_NK.div_(made[Role.SMOOTH].float())
    shifted = piece.shift * weight_NK.sum(1)
    if Role.LOWRANK_UP in made:
        weight_NK.addmm_(made[Role.LOWRANK_UP].float(), made[Role.LOWRANK_DOWN].float())
    return weight_NK, shifted


def _weight(piece: Piece, held: Mapping[Role, Tensor]) -> Tensor:
    """The stored weight, in its own dtype if it is dense."""
    return held[Role.CODES] if piece.encoding == DENSE else decoded(piece, dict(held))


def _amax(weight_NK: Tensor) -> Tensor:
    low, high = weight_NK.aminmax()
    return torch.maximum(-low, high).cpu()
