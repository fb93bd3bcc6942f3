"""INT8 with a scale per output channel, inputs per token: W8A8 dynamic."""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("int8"),
    granularity="channel",
    scales=frozenset({Role.CHANNEL_SCALE}),
    activation=Activation(number="int8", granularity="token", mode="dynamic"),
    preset="int8",
    saved_as="comfy",
)
