"""INT8 weights on a CPU, inputs as they are: codes are copied to bfloat16, scales follow the product.

Every code is exact in bfloat16. Zero points and block scales are applied to the chunk, in float32
where there is a zero point, because the difference need not be a number of few bits.
"""

from typing import TYPE_CHECKING

from diffquant.encodings.fp8 import block_cell
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import blocked, by_rows, outer_scale, shifted, whole
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    import torch

    cell = block_cell(spec.encoding)
    exact = Role.ZERO_POINT in spec.roles

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        chunk = whole(parts[Role.CODES].view(torch.int8)[rows], torch.float32 if exact else dtype)
        if exact:
            shifted(chunk, -parts[Role.ZERO_POINT].float(), rows, spec.shape_NK[0])
        if Role.BLOCK_SCALE in parts:
            blocked(chunk, parts[Role.BLOCK_SCALE], rows, cell, spec.shape_NK[0])
        return chunk.to(dtype)

    return by_rows(spec, decode, outer_scale)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"int8"}),
        scales=frozenset(
            {Role.TENSOR_SCALE, Role.CHANNEL_SCALE, Role.BLOCK_SCALE, Role.ZERO_POINT}
        ),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    keeps=True,
)
