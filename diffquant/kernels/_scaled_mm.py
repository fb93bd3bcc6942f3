"""What the kernels around `torch.nn.functional.scaled_mm` share.

    scaled_mm(mat_a [M, K], mat_b [K, N] column-major, scale_a, scale_recipe_a, scale_b,
        scale_recipe_b, swizzle_a=, swizzle_b=, output_dtype=) -> [M, N]

Scales multiply. Two-level scales, their recipes and swizzles are lists, the inner one first. Source:
its docstring in torch 2.13, and the checks of `_scaled_mm_v2` in ATen.
"""

from typing import TYPE_CHECKING

from diffquant.layouts import tiles_128x4
from diffquant.plan import Activation, Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Parts


def encoded(x_MK: "Tensor", activation: Activation, parts: "Parts") -> "dict[Role, Tensor]":
    """The input's codes and scales, canonical; a static scale comes from `parts`."""
    from diffquant.activations import encoding_of
    from diffquant.encodings import ENCODINGS, Recipe

    encoding = encoding_of(activation)
    encode = ENCODINGS.load(encoding.name).encode
    assert encode is not None, "the needs admit numbers only that can be encoded"
    static = activation.mode == "static"
    scale = parts[Role.INPUT_SCALE].float().reshape(()) if static else None
    recipe = Recipe(granularity="group", group=activation.group, scale=scale)
    return encode(x_MK.float(), encoding, recipe)


def tiles(scale_RG: "Tensor", dtype: "Dtype") -> "Tensor":
    """Block scales of one byte [rows, groups] in 128 x 4 tiles, flat (SWIZZLE_32_4_4)."""
    import torch

    whole = scale_RG.view(torch.uint8)
    stored = tiles_128x4.redo(whole, Role.BLOCK_SCALE, tuple(whole.shape), ())
    return stored.reshape(-1).view(dtype)


def half(x_MK: "Tensor") -> "Dtype":
    """What the product is made in: the sums are float32, and cuBLAS rounds to bfloat16."""
    import torch

    return torch.float16 if x_MK.dtype == torch.float16 else torch.bfloat16
