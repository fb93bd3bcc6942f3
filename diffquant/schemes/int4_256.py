"""INT4 in groups of 256, inputs as they are: what torchao calls int4wo-256."""

from diffquant.plan import Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("int4"),
    granularity="group",
    group=256,
    multiple_of_K=256,
    scales=frozenset({Role.BLOCK_SCALE}),
    activation=None,
    preset="int4",
)
