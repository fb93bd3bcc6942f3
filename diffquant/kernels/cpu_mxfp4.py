"""MXFP4 weights on a CPU: a byte is looked up as two bfloat16 numbers, times powers of two.

Both are exact; the outer scales of the dual form, one per 512 columns, are rounded once.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import by_rows, byte_pairs, grouped, outer_scale, paired, powers
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts

GROUP, OUTER_GROUP = 32, 512
ONE = 127  # as an E8M0 byte


def _build(spec: Spec) -> "Multiply":
    import torch

    k = spec.shape_NK[1]
    one = torch.full((256, 1), ONE, dtype=torch.uint8)
    pairs = byte_pairs(spec.encoding, {Role.BLOCK_SCALE: one})

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        chunk = paired(parts[Role.CODES][rows], pairs, k, dtype)
        grouped(chunk, powers(parts[Role.BLOCK_SCALE][rows], dtype), GROUP)
        if Role.OUTER_SCALE in parts:
            grouped(chunk, parts[Role.OUTER_SCALE].reshape(spec.shape_NK[0], -1)[rows], OUTER_GROUP)
        return chunk

    return by_rows(spec, decode, outer_scale)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"mxfp4"}),
        options=frozenset({"exponent=ceil", "exponent=floor"}),
        scales=frozenset({Role.BLOCK_SCALE, Role.OUTER_SCALE}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
)
