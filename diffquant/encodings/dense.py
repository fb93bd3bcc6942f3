"""Dense: numbers as they are.

    codes   (N, K)   any floating dtype   the weight itself

No scales. float8 without a scale is `fp8;scale=none`, never dense.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """The stored numbers in float32, [N, K]."""
    return parts[Role.CODES].reshape(shape_NK).float()


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """The values in their own dtype."""
    return {Role.CODES: values_NK}


CODEC = Codec(
    bits=16,
    scales=(frozenset(),),
    code_dtypes=frozenset({"BF16", "F16", "F32", "F64"}),
    decode=decode,
    encode=encode,
)
