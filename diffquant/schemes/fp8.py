"""FP8 with a scale per output channel, inputs per token: what vLLM and SGLang call fp8 online."""

from diffquant.plan import Activation, Encoding, Role
from diffquant.schemes import Scheme

SCHEME = Scheme(
    encoding=Encoding("fp8"),
    granularity="channel",
    scales=frozenset({Role.CHANNEL_SCALE}),
    activation=Activation(number="fp8", granularity="token", mode="dynamic"),
    preset="fp8",
)
