"""MXFP4: e2m1 in groups of 32 that share a power of two, inputs too."""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("mxfp4"),
    granularity="group",
    group=32,
    multiple_of_K=32,
    scales=frozenset({Role.BLOCK_SCALE}),
    activation=Activation(number="mxfp4", granularity="group", group=32, mode="dynamic"),
    preset="mxfp4",
)
