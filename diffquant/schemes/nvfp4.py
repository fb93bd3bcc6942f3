"""NVFP4: e2m1 in groups of 16 with e4m3 scales under one scale per weight, inputs too."""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("nvfp4"),
    granularity="group",
    group=16,
    multiple_of_K=16,
    scales=frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE}),
    activation=Activation(number="nvfp4", granularity="group", group=16, mode="dynamic"),
    preset="nvfp4",
)
