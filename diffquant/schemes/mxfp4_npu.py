"""MXFP4 of two levels, as Ascend's operators take it: groups of 32 inside groups of 512.

No dialect stores it but msModelSlim's, whose names are those of the original repositories.
"""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("mxfp4"),
    granularity="group",
    group=512,
    multiple_of_K=32,
    scales=frozenset({Role.BLOCK_SCALE, Role.OUTER_SCALE}),
    activation=Activation(number="mxfp4", granularity="group", group=512, mode="dynamic"),
    preset="mxfp4",
    saved_as=None,
)
