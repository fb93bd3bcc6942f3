"""SVDQuant without data: NVFP4 beside a low-rank branch of rank 32.

Nunchaku's files fuse q, k and v; writing them is a converter's work.
"""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("nvfp4"),
    granularity="group",
    group=16,
    multiple_of_K=16,
    scales=frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE}),
    activation=Activation(number="nvfp4;outer=none", granularity="group", group=16, mode="dynamic"),
    rank=32,
    preset="svdq",
    scale_dtype="bfloat16",
    saved_as="nunchaku",
)
