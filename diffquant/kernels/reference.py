"""The definition of correct: the plan's equation, decoded and summed in float32.

What a 16-bit model would hold in 16 bits is rounded to its dtype, as ModelOpt's own fake
quantization does: the decoded weight, the quantized input, and the product once its bias is in it.
A ModelOpt export that lost nothing then gives ModelOpt's output exactly; without either rounding of
an operand it is off by 0.6 % (tests/unit/test_faithful.py). A float32 model rounds nowhere.

Runs every encoding on every device and emulates every activation quantization. It is slow, because
the whole weight is decoded at each call; other kernels are judged against it.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import ANY_ACTIVATION, WEIGHT_ONLY, Kernel, Needs, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    from diffquant.activations import quantized
    from diffquant.encodings import ENCODINGS

    codec = ENCODINGS.load(spec.encoding.name)

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        h_MK = x_MK
        if spec.activation is not None:
            h_MK = quantized(x_MK, spec.activation, parts).to(x_MK.dtype)
        weight_NK = codec.decode(parts, spec.encoding, spec.shape_NK).to(x_MK.dtype)
        return h_MK.float() @ weight_NK.float().T

    return multiply


KERNEL = Kernel(
    rank=1000,
    needs=Needs(activations=frozenset({WEIGHT_ONLY, ANY_ACTIVATION})),
    build=_build,
    float32=True,
)
