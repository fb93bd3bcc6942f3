"""SVDQuant without data: NVFP4 beside a low-rank branch of rank 32.

Families that Nunchaku knows are quantized in its units: q, k and v share a branch, modulation layers
are INT4 weight-only. Elsewhere each layer is one by itself.
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
