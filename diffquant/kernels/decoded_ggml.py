"""ggml's blocks on an accelerator, inputs as they are: the weight decoded whole, then one product.

Decoding is some twenty passes over the codes, exact in float32, and one rounding to the input's
dtype; meanwhile it takes up to nine bytes per weight. Not run on hardware: tests hold its
arithmetic on a CPU.
"""

from typing import TYPE_CHECKING

from diffquant.encodings import ENCODINGS
from diffquant.kernels import Kernel, Needs, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    from torch.nn.functional import linear

    decode = ENCODINGS.load(spec.encoding.name).decode

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        return linear(x_MK, decode(parts, spec.encoding, spec.shape_NK).to(x_MK.dtype))

    return multiply


KERNEL = Kernel(
    rank=900,
    needs=Needs(
        encodings=frozenset(name for name in ENCODINGS.names() if name.startswith("ggml_")),
        devices=frozenset({"ascend", "cuda", "mps", "rocm", "xpu"}),
    ),
    build=_build,
    untried=True,
)
