"""The definition of correct: decode to float32, the plan's equation in float32, one cast at the end.

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
        h_MK = x_MK.float()
        if spec.activation is not None:
            h_MK = quantized(h_MK, spec.activation, parts)
        weight_NK = codec.decode(parts, spec.encoding, spec.shape_NK)
        return (h_MK @ weight_NK.T).to(x_MK.dtype)

    return multiply


KERNEL = Kernel(
    rank=1000,
    needs=Needs(activations=frozenset({WEIGHT_ONLY, ANY_ACTIVATION})),
    build=_build,
    float32=True,
)
