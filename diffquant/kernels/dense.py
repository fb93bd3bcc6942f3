"""Dense pieces: the product torch itself makes. For bf16 weights that carry smoothing or low rank."""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import DENSE, Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    from torch.nn.functional import linear

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        return linear(x_MK, parts[Role.CODES].to(x_MK.dtype))

    return multiply


KERNEL = Kernel(rank=0, needs=Needs(encodings=frozenset({DENSE.name})), build=_build)
