"""FP8 weights on a CPU: decode by integer shifts into one reused buffer, multiply in cache-sized chunks.

Every e4m3 value is exact in bfloat16, so tensor and channel scales are applied to the product, and
block scales to the chunk. `inspect --deep` names files that hold NaN bytes, which decode to 480 here.
"""

from typing import TYPE_CHECKING

from diffquant.encodings.fp8 import block_cell
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import blocked, by_rows, e4m3, outer_scale
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    cell = block_cell(spec.encoding)

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        chunk = e4m3(parts[Role.CODES][rows], dtype)
        if Role.BLOCK_SCALE not in parts:
            return chunk
        return blocked(chunk, parts[Role.BLOCK_SCALE], rows, cell, spec.shape_NK[0])

    return by_rows(spec, decode, outer_scale)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"fp8"}),
        options=frozenset({"kind=e4m3", "block=128x128"}),
        scales=frozenset({Role.TENSOR_SCALE, Role.CHANNEL_SCALE, Role.BLOCK_SCALE}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    keeps=True,
)
