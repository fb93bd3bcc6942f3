"""INT8 by the largest magnitude of a row (LLM.int8): the stored scale is 127 times a step.

    codes           (N, K)   int8      two's complement
    channel_scale   (N,)     float32   the row's largest magnitude: multiplies, then 1 / 127 does

The constant is the float32 nearest to 1 / 127, and multiplies last.
Source: bitsandbytes 0.50 (arXiv:2208.07339), bit-equal.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe, int8
from diffquant.encodings._scales import channel_grid, decode_rows, tensor_grid
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = codes * amax * (1 / 127), float32, rounded in that order."""
    import torch

    codes = parts[Role.CODES].reshape(shape_NK).view(torch.int8)
    step = torch.tensor(1 / int8.LARGEST, device=codes.device)
    scales = (channel_grid(parts[Role.CHANNEL_SCALE], shape_NK), tensor_grid(step, shape_NK))
    return decode_rows(codes, lambda rows: rows, shape_NK, scales)


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """As int8 by rows, whatever granularity is asked for: there is no other. Scales times 127."""
    rows = replace(recipe, granularity="channel", group=None)
    parts = int8.encode(values_NK, encoding, rows)
    return {**parts, Role.CHANNEL_SCALE: parts[Role.CHANNEL_SCALE] * int8.LARGEST}


CODEC = Codec(
    bits=8,
    scales=(frozenset({Role.CHANNEL_SCALE}),),
    code_dtypes=frozenset({"I8"}),
    decode=decode,
    encode=encode,
)
