"""How numbers are stored: one file per encoding, its docstring the byte table.

A codec is the exact meaning of stored bytes. `decode` defines it, in float32; kernels are judged
against it. `encode` is used for weights (online quantization, converters) and for activations
(faithful numerics): x[M, K] is treated as a weight with M rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from diffquant.plan import Encoding, Role
from diffquant.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[Role, Tensor]

Granularity = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What `encode` should do.

    granularity  one scale per tensor, per row (channel), per `group` columns, or per `group` ×
                 `group` block
    scale        a given tensor scale (or outer scale) instead of one taken from the values
    unsigned     4-bit activations behind GELU: codes 0..15 instead of -8..7
    arithmetic   whose order of rounding, where tools differ (`nvfp4.ARITHMETIC`)
    """

    granularity: Granularity
    group: int | None = None
    scale: "Tensor | None" = None
    unsigned: bool = False
    arithmetic: str = "modelopt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """One encoding.

    bits          stored bits per weight; scales count where they lie among the codes
    scales        the sets of weight-side scale roles that are complete; a piece must hold one whole
                  set, or loading stops: a missing scale is never 1.0
    waived        "option=value" -> scale roles that are not needed where the encoding says so
    scales_inside scales lie among the codes, in one tensor
    optional      other weight-side roles it understands (zero_point, codebook, correction …)
    code_dtypes   safetensors dtypes its codes are stored in
    decode(parts, encoding, shape_NK) -> float32 [N, K]
    encode(values_NK, encoding, recipe) -> parts in canonical order, arithmetic in values' dtype
    """

    bits: float
    scales: tuple[frozenset[Role], ...]
    code_dtypes: frozenset[str]
    waived: Mapping[str, frozenset[Role]] = field(default_factory=dict)
    optional: frozenset[Role] = frozenset()
    group: int | None = None
    scales_inside: bool = False
    decode: "Callable[[Parts, Encoding, tuple[int, int]], Tensor]"
    encode: "Callable[[Tensor, Encoding, Recipe], dict[Role, Tensor]] | None" = None

    def is_complete(self, encoding: Encoding, roles: frozenset[Role]) -> bool:
        """Whether `roles` hold every scale that the encoding needs."""
        spelled = {f"{key}={value}" for key, value in encoding.options}
        waived = {role for option in spelled for role in self.waived.get(option, ())}
        return any(wanted - waived <= roles for wanted in self.scales)


ENCODINGS: Registry[Codec] = Registry("diffquant.encodings", "CODEC")
