"""LLM.int8 weights on a CPU, inputs as they are: codes are copied to bfloat16, where every one is exact.

The product of each row is multiplied once, by its largest magnitude over 127.
"""

from typing import TYPE_CHECKING

from diffquant.encodings.int8 import LARGEST
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import by_rows, whole
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    import torch

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        return whole(parts[Role.CODES].view(torch.int8)[rows], dtype)

    def outer(parts: "Parts", rows: slice) -> "Tensor":
        return parts[Role.CHANNEL_SCALE].reshape(-1)[rows].float() * (1 / LARGEST)

    return by_rows(spec, decode, outer)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"int8_amax"}),
        scales=frozenset({Role.CHANNEL_SCALE}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    keeps=True,
)
