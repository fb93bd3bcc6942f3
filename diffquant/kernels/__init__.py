"""Ways to multiply by an encoded weight: one file per kernel, its needs stated as data.

Needs are checked before anything is loaded and every refusal is kept; try/except is not dispatch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffquant.plan import Activation, Encoding, Role, Rotation
from diffquant.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[Role, Tensor]
    Multiply = Callable[[Tensor, Parts], Tensor]

Numerics = Literal["auto", "faithful", "weight-only"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a kernel must know about one piece, beside its tensors.

    shape_NK    of the canonical weight; parts are in canonical order (see `plan.Role`)
    roles       the parts there are
    activation  how to quantize the input, None for weight-only arithmetic
    """

    encoding: Encoding
    shape_NK: tuple[int, int]
    roles: frozenset[Role]
    activation: Activation | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What must hold for a kernel to run a piece. Empty sets mean "any".

    encodings    names of encodings
    scales       weight-scale roles it can apply; the piece's must be among them
    activations  canonical activation strings it quantizes itself; "none" is weight-only
    devices      cpu, cuda, rocm, mps …;  sm: half-open range of compute capabilities such as 89..121
    multiple_of_N, multiple_of_K   shape constraints
    packages     distributions that must be installed, with least versions
    """

    encodings: frozenset[str] = frozenset()
    scales: frozenset[Role] = frozenset()
    activations: frozenset[str] = frozenset({"none"})
    devices: frozenset[str] = frozenset()
    sm: tuple[int, int] | None = None
    multiple_of_N: int = 1
    multiple_of_K: int = 1
    packages: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel.

    rank      lower is tried first among those whose needs hold
    build     Spec -> multiply(x [M, K], parts) -> [M, N]; imports vendors inside; no bias
    prepare   canonical parts -> extra tensors for `multiply` on this device (repacks), or None
    float32   the whole layer (smoothing, low rank, bias) is to be computed in float32 around it
    opt_in    only runs when named by --kernel
    identical name of a group of kernels that give bit-identical results
    """

    rank: int
    needs: Needs
    build: "Callable[[Spec], Multiply]"
    prepare: "Callable[[Parts, Spec], dict[str, Tensor]] | None" = None
    float32: bool = False
    opt_in: bool = False
    identical: str | None = None


KERNELS: Registry[Kernel] = Registry("diffquant.kernels", "KERNEL")
