"""The static scale of a layer's input, from the largest value that calibration saw."""

import torch
from torch import Tensor

from diffquant.activations import GRANULARITIES, encoding_of
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.plan import Activation, Role


def input_scale(activation: Activation, amax: float) -> Tensor:
    """The scale () of inputs up to `amax`: what the codec itself would take for such an input."""
    encoding = encoding_of(activation)
    codec = ENCODINGS.load(encoding.name)
    assert codec.encode is not None, "only numbers that can be written are calibrated"
    witness = torch.zeros(1, activation.group or 1)
    witness[0, 0] = amax
    recipe = Recipe(granularity=GRANULARITIES[activation.granularity], group=activation.group)
    return codec.encode(witness, encoding, recipe)[Role.TENSOR_SCALE].reshape(())
