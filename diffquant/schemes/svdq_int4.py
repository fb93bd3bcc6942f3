"""SVDQuant without data: INT4 in groups of 64 beside a low-rank branch of rank 32.

Families that Nunchaku knows are quantized in its units: q, k and v share a branch, what GELU feeds is
shifted and unsigned, modulation layers are INT4 weight-only. Elsewhere each layer is one by itself.
"""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("int4", (("group", "64"),)),
    granularity="group",
    group=64,
    multiple_of_K=64,
    scales=frozenset({Role.BLOCK_SCALE}),
    activation=Activation(number="int4", granularity="group", group=64, mode="dynamic"),
    rank=32,
    preset="svdq",
    scale_dtype="bfloat16",
    saved_as="nunchaku",
)
