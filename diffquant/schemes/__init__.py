"""What `--quantization NAME` does to dense weights while loading: one file per scheme.

A scheme is data: numbers, granularity, what the input is quantized to, which preset knows the
layers it must not touch. The module's name is the value that is typed; other people's words for the
same thing are in `aliases.toml`. No scheme looks at any data but the weights.
"""

from dataclasses import dataclass
from typing import Literal

from diffquant.plan import Activation, Encoding, Recode, Role
from diffquant.plugins import Registry

Granularity = Literal["tensor", "channel", "group", "block"]

#: The parts of a low-rank branch.
LOWRANK = frozenset({Role.LOWRANK_UP, Role.LOWRANK_DOWN})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way to quantize a dense linear layer.

    granularity    of the weight scale, as in `plan.Recode`
    scales         the weight scales a quantized piece has
    activation     how inputs are to be quantized; None is weight-only
    preset         the algorithm whose preset says which layers stay (see `preset.for_algorithm`)
    multiple_of_K  layers whose K it does not divide stay dense
    rank           of the low-rank branch that carries what quantizing loses; None: no branch
    scale_dtype    what scales are rounded to; None: float32
    saved_as       the format that can store the result; None where no dialect can
    """

    encoding: Encoding
    granularity: Granularity
    scales: frozenset[Role]
    activation: Activation | None
    preset: str
    group: int | None = None
    multiple_of_K: int = 1
    rank: int | None = None
    scale_dtype: str | None = None
    saved_as: str | None = "modelopt"

    @property
    def roles(self) -> frozenset[Role]:
        """Parts a quantized piece has beside its bias."""
        return self.scales | {Role.CODES} | (LOWRANK if self.rank else frozenset())

    @property
    def is_shared(self) -> bool:
        """Whether siblings take one tensor scale from all of their weights. What a low-rank branch
        leaves of each has a range of its own."""
        return Role.TENSOR_SCALE in self.scales and self.rank is None

    def recode(self, shared_amax: str | None = None) -> Recode:
        """What the plan says of a piece quantized this way."""
        return Recode(
            encoding=self.encoding,
            granularity=self.granularity,
            group=self.group,
            activation=self.activation,
            roles=self.roles,
            rank=self.rank,
            scale_dtype=self.scale_dtype,
            shared_amax=shared_amax if self.is_shared else None,
        )


SCHEMES: Registry[Scheme] = Registry("diffquant.schemes", "SCHEME")
