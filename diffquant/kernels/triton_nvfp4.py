"""NVFP4 weights times 16-bit inputs in Triton: codes times e4m3 scales become numbers in registers.

The product runs on ordinary tensor cores, from Ampere on; outer scales multiply the sums. What
Marlin does for other loaders up to Hopper. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    from diffquant.kernels._triton import numbers, weights
    from diffquant.kernels._triton.weight_only import Numbers

    group = int(spec.encoding.option("block", "16"))
    how = Numbers(code=numbers.e2m1, scale=numbers.e4m3)
    product = weights.product(spec, how, lambda _: group)
    if spec.encoding.option("tensor_scale", "multiply") != "divide":
        return product

    def divided(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        return product(x_MK, _inverted(parts))

    return divided


def _inverted(parts: "Parts") -> "Parts":
    """The tensor scale as a factor."""
    if Role.TENSOR_SCALE not in parts:
        return parts
    return {**parts, Role.TENSOR_SCALE: parts[Role.TENSOR_SCALE].float().reciprocal()}


KERNEL = Kernel(
    rank=90,
    needs=Needs(
        encodings=frozenset({"nvfp4"}),
        options=frozenset(
            {"block=16", "block=32", "outer=none", "tensor_scale=multiply", "tensor_scale=divide"}
        ),
        scales=frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE, Role.CHANNEL_SCALE}),
        devices=frozenset({"cuda"}),
        sm=(80, 122),
        packages=("triton",),
    ),
    build=_build,
    untried=True,
)
