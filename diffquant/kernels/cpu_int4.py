"""INT4 weights on a CPU: codes to numbers by integer shifts, times their group's bfloat16 scale.

Where K does not divide into groups, where scales are wider than bfloat16, or where there is a zero
point, a byte is looked up as two numbers.
Where there is a zero point a chunk is made in float32 and rounded once: with Nunchaku's, which is
added to the scaled code, the two terms are larger than their sum.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import by_rows, grouped, outer_scale, shifted
from diffquant.kernels._cpu_nibbles import (
    by_planes,
    byte_pairs,
    int4_planes,
    paired,
    planes_of,
    scaled_planes,
)
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    import torch

    k, named = spec.shape_NK[1], int(spec.encoding.option("group", "0"))
    by_words, by_bytes = _words(spec, named), _bytes(spec, named)
    whole = spec.encoding.option("signed", "true") != "offset" and Role.ZERO_POINT not in spec.roles

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        scale = parts.get(Role.BLOCK_SCALE)
        # Wider scales than bfloat16 would be rounded, and all of a group the same way.
        fits = whole and scale is not None and scale.dtype == torch.bfloat16
        if scale is None or not fits or not by_planes(k, named or k // scale.shape[1]):
            return by_bytes(x_MK, parts)
        return by_words(x_MK, parts)

    return multiply


def _words(spec: Spec, named: int) -> "Multiply":
    k, signed = spec.shape_NK[1], spec.encoding.option("signed", "true") == "true"

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        scale = parts[Role.BLOCK_SCALE][rows]
        owned = scale[:, : k // named] if named else scale
        return scaled_planes(int4_planes(parts[Role.CODES][rows], signed, dtype), owned)

    return by_rows(spec, decode, outer_scale, order=planes_of)


def _bytes(spec: Spec, named: int) -> "Multiply":
    import torch

    n, k = spec.shape_NK
    pairs = byte_pairs(spec.encoding, {Role.BLOCK_SCALE: torch.ones(256, 1)})
    added = spec.encoding.option("zero", "integer") == "scaled"
    exact = Role.ZERO_POINT in spec.roles

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        held = _trimmed(parts, k, named)
        chunk = paired(held[Role.CODES][rows], pairs, k, torch.float32 if exact else dtype)
        if exact and not added:
            shifted(chunk, -held[Role.ZERO_POINT].float(), rows, n)
        if Role.BLOCK_SCALE in held:
            scale = held[Role.BLOCK_SCALE]
            grouped(chunk, scale[rows], named or k // scale.shape[1])
        if exact and Role.CHANNEL_SCALE in held:
            chunk.mul_(held[Role.CHANNEL_SCALE].float().reshape(n, 1)[rows])
        if exact and added:
            shifted(chunk, held[Role.ZERO_POINT].float(), rows, n)
        return chunk.to(dtype)

    def outer(parts: "Parts", rows: slice) -> "Tensor | None":
        return None if exact else outer_scale(parts, rows)

    return by_rows(spec, decode, outer)


def _trimmed(parts: "Parts", columns: int, group: int) -> "Parts":
    """The parts without groups beyond K, where the encoding names the group."""
    if not group:
        return parts
    wanted = -(-columns // group)
    padded = [role for role in (Role.BLOCK_SCALE, Role.ZERO_POINT) if role in parts]
    cut = {role: parts[role][:, :wanted] for role in padded if parts[role].ndim == 2}
    return {**parts, **cut}


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"int4"}),
        # A tensor scale beside a block scale means something else: the weight is held as fp8.
        scales=frozenset({Role.BLOCK_SCALE, Role.CHANNEL_SCALE, Role.ZERO_POINT}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    keeps=True,
)
