"""SVDQuant's INT4 products in Triton, on Hopper too: inputs become int4 in groups of 64, as the format
asks, and codes multiply codes on int8 tensor cores.

What Nunchaku's own kernel computes, on hardware without INT4 tensor cores: each group's sum of
products is the same integer, so that the picture has the errors of 4-bit inputs and no others.
Ampere to Hopper. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

GROUP = 64


def _build(spec: Spec) -> "Multiply":
    from torch import uint8

    from diffquant.kernels._triton import inputs, svdq

    assert spec.activation is not None, "the needs admit quantized activations only"
    unsigned = spec.activation.unsigned

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        codes_MK, scale_GM = inputs.as_int4(x_MK, GROUP, unsigned=unsigned)
        up = parts.get(Role.LOWRANK_UP)
        return svdq.multiply(
            codes_MK,
            scale_GM,
            parts[Role.CODES].view(uint8),
            parts[Role.BLOCK_SCALE],
            x_MK.dtype,
            parts.get(Role.LOWRANK_DOWN),
            None if up is None else up.to(x_MK.dtype),
        )

    return multiply


KERNEL = Kernel(
    rank=50,
    needs=Needs(
        encodings=frozenset({"int4"}),
        options=frozenset({"group=64", "signed=true"}),
        scales=frozenset({Role.BLOCK_SCALE}),
        activations=frozenset({"int4:group64:dynamic", "int4:group64:dynamic:unsigned"}),
        devices=frozenset({"cuda"}),
        sm=(80, 91),
        multiple_of_K=GROUP,
        packages=("triton",),
    ),
    build=_build,
    # The branch is added to the sums before their one rounding.
    fuses=frozenset({Role.LOWRANK_DOWN, Role.LOWRANK_UP}),
    untried=True,
)
