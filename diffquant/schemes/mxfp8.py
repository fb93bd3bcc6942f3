"""MXFP8: e4m3 in groups of 32 that share a power of two, inputs too."""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("mxfp8"),
    granularity="group",
    group=32,
    multiple_of_K=32,
    scales=frozenset({Role.BLOCK_SCALE}),
    activation=Activation(number="mxfp8", granularity="group", group=32, mode="dynamic"),
    preset="mxfp8",
)
