"""INT4 in groups of 128, inputs as they are: what torchao calls int4wo-128."""

from diffquant.plan import Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("int4"),
    granularity="group",
    group=128,
    multiple_of_K=128,
    scales=frozenset({Role.BLOCK_SCALE}),
    activation=None,
    preset="int4",
)
