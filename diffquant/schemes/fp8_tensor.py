"""FP8 with one scale per weight, one for q, k and v; inputs per tensor. ModelOpt's FP8 default."""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("fp8"),
    granularity="tensor",
    scales=frozenset({Role.TENSOR_SCALE}),
    activation=Activation(number="fp8", granularity="tensor", mode="dynamic"),
    preset="fp8",
)
