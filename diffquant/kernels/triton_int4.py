"""INT4 weights times 16-bit inputs in Triton: codes, less their zero point and scaled, in registers.

Nunchaku's zero points are added to scaled codes instead, its modulation layers have such. The
product runs on ordinary tensor cores, from Ampere on. Not run on hardware.
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

    k, named = spec.shape_NK[1], int(spec.encoding.option("group", "0"))
    codes = {"true": numbers.signed4, "false": numbers.unsigned4, "offset": numbers.offset4}
    added = spec.encoding.option("zero", "integer") == "scaled"
    zero = "added" if added else "subtracted"
    how = Numbers(
        code=codes[spec.encoding.option("signed", "true")],
        scale=numbers.number if added or Role.BLOCK_SCALE in spec.roles else None,
        zero=zero if Role.ZERO_POINT in spec.roles else "none",
    )
    product = weights.product(spec, how, lambda count: named or k // count)

    def joined(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        return product(x_MK, _joined(parts))

    return joined if added and Role.CHANNEL_SCALE in spec.roles else product


def _joined(parts: "Parts") -> "Parts":
    """Channel and block scale as one: what is added afterwards is scaled by neither."""
    scale = parts[Role.CHANNEL_SCALE].float().reshape(-1, 1)
    if Role.BLOCK_SCALE in parts:
        scale = scale * parts[Role.BLOCK_SCALE].float()
    rest = dict(parts)
    del rest[Role.CHANNEL_SCALE]
    return rest | {Role.BLOCK_SCALE: scale}


KERNEL = Kernel(
    rank=90,
    needs=Needs(
        encodings=frozenset({"int4"}),
        # A tensor scale beside a block scale means something else: the weight is held as fp8.
        scales=frozenset({Role.BLOCK_SCALE, Role.CHANNEL_SCALE, Role.ZERO_POINT}),
        devices=frozenset({"cuda"}),
        sm=(80, 122),
        packages=("triton",),
    ),
    build=_build,
    untried=True,
)
