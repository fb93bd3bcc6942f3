"""INT4 in groups of 32, inputs as they are: what torchao calls int4wo-32."""

from diffquant.plan import Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("int4"),
    granularity="group",
    group=32,
    multiple_of_K=32,
    scales=frozenset({Role.BLOCK_SCALE}),
    activation=None,
    preset="int4",
)
