"""INT4 weights on a CPU: a byte is looked up as two bfloat16 numbers, times its group's scale.

Where there is a zero point a chunk is made in float32 and rounded once: with Nunchaku's, which is
added to the scaled code, the two terms are larger than their sum.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import by_rows, byte_pairs, grouped, outer_scale, paired, shifted
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    import torch

    n, k = spec.shape_NK
    named = int(spec.encoding.option("group", "0"))
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

    return by_rows(spec, decode, (lambda parts: None) if exact else outer_scale)


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
)
