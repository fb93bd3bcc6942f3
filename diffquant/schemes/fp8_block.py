"""FP8 in blocks of 128 x 128, inputs in groups of 128, as DeepSeek published its weights."""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("fp8"),
    granularity="block",
    group=128,
    multiple_of_K=128,
    scales=frozenset({Role.BLOCK_SCALE}),
    activation=Activation(number="fp8", granularity="group", group=128, mode="dynamic"),
    preset="fp8",
    saved_as="fp8",
)
