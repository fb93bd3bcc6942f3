"""INT8 with a scale per output channel, inputs as they are: torchao's int8wo."""

from diffquant.plan import Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("int8"),
    granularity="channel",
    scales=frozenset({Role.CHANNEL_SCALE}),
    activation=None,
    preset="int8",
)
