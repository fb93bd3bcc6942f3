"""QuantLinear: an nn.Linear whose weight stays encoded.

diffusers, transformers and PEFT ask a linear for its type, `weight.dtype`, `weight.device`,
`in_features` and `bias`; all of these answer. The weight itself does not exist: `.weight` is a
zero-stride view of one NaN, so that merging a LoRA into it fails loudly and nothing can save it as
if it were one. Codes and scales are buffers that `.to(dtype)` cannot touch; only what computes in
the model's dtype (smoothing, low rank, bias) follows it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffquant.plan import LayerPlan, Piece, Role
from diffquant.rotation import rotated

Multiply = Callable[[Tensor, Mapping[Role, Tensor]], Tensor]

#: Parts that compute in the model's dtype and follow `.to(dtype)`. All others are codes and scales.
FOLLOWING = frozenset({Role.SMOOTH, Role.LOWRANK_UP, Role.LOWRANK_DOWN})


Parts = Mapping[Role, Tensor]


@dataclass(frozen=True, slots=True)
class Holding:
    """What a kernel does to a piece beyond its product.

    fuses    roles of `FOLLOWING` that `multiply` applies itself
    restore  parts as the kernel holds them -> canonical ones; None: they are
    """

    fuses: frozenset[Role] = frozenset()
    restore: Callable[[Parts], dict[Role, Tensor]] | None = None


ORDINARY = Holding()


@dataclass(frozen=True, slots=True)
class Term:
    """One piece at work: where it reads and writes, and how it multiplies."""

    piece: Piece
    names: Mapping[Role, str]
    multiply: Multiply
    holding: Holding = ORDINARY


class QuantLinear(nn.Linear):
    """y = x Wᵀ + b by the plan's equation, W encoded; x [..., K], y [..., N].

    layer     the plan's layer
    parts     of each piece, on one device; canonical, or as its kernel holds them
    multiply  one product per piece (a kernel's `build`)
    holdings  one per piece; none: all ordinary
    bias      [N] or None, already summed over the pieces
    dtype     of the model around it
    float32   a kernel returns float32 sums: pieces and bias join them before the one rounding
    """

    def __init__(
        self,
        layer: LayerPlan,
        parts: Sequence[Mapping[Role, Tensor]],
        multiply: Sequence[Multiply],
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
        float32: bool = False,
        holdings: Sequence[Holding] = (),
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = layer.shape_NK
        self.layer = layer
        self.float32 = float32
        self.terms = tuple(
            Term(piece, self._hold(index, held, dtype), product, holding)
            for index, (piece, held, product, holding) in enumerate(
                zip(layer.pieces, parts, multiply, holdings or [ORDINARY] * len(parts), strict=True)
            )
        )
        device = next(iter(parts[0].values())).device
        self.register_buffer(
            "nan", torch.full((), torch.nan, dtype=dtype, device=device), persistent=False
        )
        kept = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", kept)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """NaN [N, K] without storage: it answers for dtype and device, and for nothing else."""
        return self.get_buffer("nan").expand(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        rows_MK = input.reshape(-1, self.in_features)
        smoothed = [self._smoothed(index, rows_MK) for index in range(len(self.terms))]
        y_MN = self._product(rows_MK, smoothed)
        if self.bias is not None:
            y_MN += self.bias.to(y_MN.dtype)
        y_MN = self._with_lowrank(y_MN.to(input.dtype), rows_MK, smoothed)
        return y_MN.reshape(*input.shape[:-1], self.out_features)

    def parts(self, index: int) -> dict[Role, Tensor]:
        """The canonical parts of piece `index`, on the device where they lie now."""
        restore = self.terms[index].holding.restore
        return self._held(index) if restore is None else restore(self._held(index))

    def _held(self, index: int) -> dict[Role, Tensor]:
        return {role: self.get_buffer(name) for role, name in self.terms[index].names.items()}

    def extra_repr(self) -> str:
        held = ", ".join(str(piece.runs_as) for piece in self.layer.pieces)
        return f"in_features={self.in_features}, out_features={self.out_features}, {held}"

    def _hold(
        self, index: int, parts: Mapping[Role, Tensor], dtype: torch.dtype
    ) -> dict[Role, str]:
        names: dict[Role, str] = {}
        for role, part in parts.items():
            if role is Role.BIAS:
                continue
            names[role] = f"piece{index}_{role.value}"
            following = role in FOLLOWING or (role is Role.CODES and _is_dense(part))
            self.register_buffer(names[role], part.to(dtype) if following else part)
        return names

    def _smoothed(self, index: int, rows_MK: Tensor) -> Tensor:
        """What piece `index` reads: its columns, shifted and smoothed in the model's dtype."""
        piece = self.terms[index].piece
        raw = self._columns(piece, rows_MK)
        shifted = raw + piece.shift if piece.shift else raw
        if Role.SMOOTH in self.terms[index].holding.fuses:
            return shifted
        return _smoothed(shifted, piece, self._held(index))

    def _product(self, rows_MK: Tensor, smoothed: Sequence[Tensor]) -> Tensor:
        """The products of all pieces, without bias and the low rank that no kernel fuses."""
        products = [
            term.multiply(
                rotated(h_MK, term.piece.rotation), self._given(index, rows_MK, smoothed[index])
            )
            for index, (term, h_MK) in enumerate(zip(self.terms, smoothed, strict=True))
        ]
        if len(products) == 1:
            return products[0]
        dtype = torch.float32 if self.float32 else smoothed[0].dtype
        y_MN = smoothed[0].new_zeros(smoothed[0].shape[0], self.out_features, dtype=dtype)
        for term, product in zip(self.terms, products, strict=True):
            y_MN[:, term.piece.out.as_slice()] += product
        return y_MN

    def _with_lowrank(self, y_MN: Tensor, rows_MK: Tensor, smoothed: Sequence[Tensor]) -> Tensor:
        """Adds the low-rank branches, which ModelOpt computes beside the finished linear: with its two
        roundings where the reference runs, in one step and one rounding where speed counts."""
        for index, (term, h_MK) in enumerate(zip(self.terms, smoothed, strict=True)):
            piece = term.piece
            if piece.lowrank_input is None or Role.LOWRANK_UP in term.holding.fuses:
                continue
            low_MR = self._low(index, rows_MK, h_MK)
            up = self._held(index)[Role.LOWRANK_UP].to(low_MR.dtype)
            out_MN = y_MN[:, piece.out.as_slice()]
            if self.float32:
                out_MN += low_MR @ up.T
            else:
                out_MN.addmm_(low_MR, up.T)
        return y_MN

    def _given(self, index: int, rows_MK: Tensor, h_MK: Tensor) -> Parts:
        """The parts for the kernel. One that adds the low-rank branch without smoothing does not see
        what the branch reads, so it is given l · Dᵀ [M, R] in the place of D."""
        held, fuses = self._held(index), self.terms[index].holding.fuses
        if Role.SMOOTH in fuses or Role.LOWRANK_DOWN not in fuses & held.keys():
            return held
        return {**held, Role.LOWRANK_DOWN: self._low(index, rows_MK, h_MK)}

    def _low(self, index: int, rows_MK: Tensor, h_MK: Tensor) -> Tensor:
        """l · Dᵀ [M, R] of piece `index`."""
        piece = self.terms[index].piece
        low = self._columns(piece, rows_MK) if piece.lowrank_input == "raw" else h_MK
        return low @ self._held(index)[Role.LOWRANK_DOWN].to(low.dtype).T

    def _columns(self, piece: Piece, rows_MK: Tensor) -> Tensor:
        return rows_MK[:, piece.cols.as_slice()] if len(self.terms) > 1 else rows_MK

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Moves everything, casts only what follows the model's dtype.

        `fn` is torch's closure behind `.to()`, `.cuda()`, `.half()`; whether it casts is seen on an
        empty tensor, so that codes are never cast, not even for a moment.
        """
        kept = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and _casts(fn, buffer) and not self._follows(name)
        }
        for name in kept:
            self._buffers[name] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(fn(buffer.new_empty(0)).device)
        return self

    def _follows(self, name: str) -> bool:
        following = tuple(role.value for role in FOLLOWING)
        if name == "nan" or name.endswith(following):
            return True
        buffer = self._buffers[name]
        return name.endswith(Role.CODES.value) and buffer is not None and _is_dense(buffer)


def _smoothed(x_MK: Tensor, piece: Piece, parts: Mapping[Role, Tensor]) -> Tensor:
    if piece.smooth is None:
        return x_MK
    smooth = parts[Role.SMOOTH].to(x_MK.dtype)
    return x_MK * smooth if piece.smooth == "multiply" else x_MK / smooth


def _is_dense(codes: Tensor) -> bool:
    return codes.is_floating_point() and codes.element_size() > 1


def _casts(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> bool:
    return fn(buffer.new_empty(0)).dtype != buffer.dtype
