"""INT8 in blocks of 128 x 128, inputs in groups of 128."""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("int8"),
    granularity="block",
    group=128,
    multiple_of_K=128,
    scales=frozenset({Role.BLOCK_SCALE}),
    activation=Activation(number="int8", granularity="group", group=128, mode="dynamic"),
    preset="int8",
    saved_as="comfy",
)
