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


@dataclass(frozen=True, slots=True)
class Term:
    """One piece at work: where it reads and writes, and how it multiplies."""

    piece: Piece
    names: Mapping[Role, str]
    multiply: Multiply


class QuantLinear(nn.Linear):
    """y = x Wᵀ + b by the plan's equation, W encoded; x [..., K], y [..., N].

    layer     the plan's layer
    parts     canonical parts of each piece, on one device
    multiply  one product per piece (a kernel's `build`)
    bias      [N] or None, already summed over the pieces
    dtype     of the model around it
    float32   compute the whole layer in float32 and cast once at the end
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
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = layer.shape_NK
        self.layer = layer
        self.float32 = float32
        self.terms = tuple(
            Term(piece, self._hold(index, held, dtype), product)
            for index, (piece, held, product) in enumerate(
                zip(layer.pieces, parts, multiply, strict=True)
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
        if self.float32:
            rows_MK = rows_MK.float()
        y_MN = self._product(rows_MK)
        if self.bias is not None:
            y_MN = y_MN + self.bias.to(y_MN.dtype)
        return y_MN.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def parts(self, index: int) -> dict[Role, Tensor]:
        """The canonical parts of piece `index`, as they lie on the device now."""
        return {role: self.get_buffer(name) for role, name in self.terms[index].names.items()}

    def extra_repr(self) -> str:
        held = ", ".join(str(piece.runs_as) for piece in self.layer.pieces)
        return f"in_features={self.in_features}, out_features={self.out_features}, {held}"

    def _hold(
        self, index: int, parts: Mapping[Role, Tensor], dtype: torch.dtype
    ) -> dict[Role, str]:
        names = {}
        for role, part in parts.items():
            if role is Role.BIAS:
                continue
            names[role] = f"piece{index}_{role.value}"
            following = role in FOLLOWING or (role is Role.CODES and _is_dense(part))
            self.register_buffer(names[role], part.to(dtype) if following else part)
        return names

    def _product(self, rows_MK: Tensor) -> Tensor:
        first = self.terms[0]
        if len(self.terms) == 1:
            return self._term(0, first, rows_MK)
        y_MN = rows_MK.new_zeros(rows_MK.shape[0], self.out_features)
        for index, term in enumerate(self.terms):
            y_MN[:, term.piece.out.as_slice()] += self._term(index, term, rows_MK)
        return y_MN

    def _term(self, index: int, term: Term, rows_MK: Tensor) -> Tensor:
        """One piece without its bias: smooth, rotate, multiply, add the low-rank branch."""
        piece, parts = term.piece, self.parts(index)
        raw = rows_MK[:, piece.cols.as_slice()] if len(self.terms) > 1 else rows_MK
        smoothed = _smoothed(raw + piece.shift if piece.shift else raw, piece, parts)
        y_MN = term.multiply(rotated(smoothed, piece.rotation), parts)
        if piece.lowrank_input is None:
            return y_MN
        low = raw if piece.lowrank_input == "raw" else smoothed
        down, up = (parts[role].to(low.dtype) for role in (Role.LOWRANK_DOWN, Role.LOWRANK_UP))
        return y_MN + (low @ down.T) @ up.T

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
        super()._apply(fn, recurse)
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
