"""E8M0, the power-of-two scale of OCP microscaling: byte b means 2^(b - 127), 255 means NaN."""

from math import floor, log2
from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.plan import Encoding

if TYPE_CHECKING:
    from torch import Tensor


def values(scale: "Tensor") -> "Tensor":
    """Float32 of bytes stored as uint8 or float8_e8m0fnu; exact, the subnormal 2^-127 included."""
    import torch

    bits = torch.arange(256, dtype=torch.int32, device=scale.device) << 23
    bits[0], bits[255] = 0x0040_0000, 0x7FC0_0000
    table = bits.view(torch.float32)
    return table[scale.view(torch.uint8).long()]


def scales(amax: "Tensor", largest: float, encoding: Encoding) -> "Tensor":
    """The byte for every block maximum. Two rules are in use, the encoding's `exponent` names one:

    ceil   2^ceil(log2(amax / largest))                   nothing saturates; ModelOpt, cuDNN (default)
    floor  2^(floor(log2(amax)) - floor(log2(largest)))   OCP specification, Ascend; the top may clip

    A block of zeros gets byte 0, one with infinity or NaN byte 255.
    """
    import torch

    rule = encoding.option("exponent", "ceil")
    if rule not in ("ceil", "floor"):
        raise PlanError(f"{rule!r} is no rule for exponents", hint="one of: ceil, floor")
    ratio = amax.float() / largest if rule == "ceil" else amax.float()
    mantissa, exponent = torch.frexp(ratio)
    if rule == "ceil":
        exponent = exponent - (mantissa == 0.5).int()
    else:
        exponent = exponent - 1 - floor(log2(largest))
    exponent = torch.where(ratio > 0, exponent, -127).clamp(-127, 127) + 127
    return torch.where(ratio.isfinite(), exponent, 255).to(torch.uint8)
