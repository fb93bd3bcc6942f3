"""A dense weight -> codes and scales, in the numbers a recode asks for."""

import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS, Recipe
from diffquant.errors import PlanError
from diffquant.plan import Recode, Role

#: The scales a codec makes, outermost first: it is the first of them that is given or rounded.
SCALES = (Role.TENSOR_SCALE, Role.BLOCK_SCALE)


def codes(weight_NK: Tensor, recode: Recode, scale: Tensor | None = None) -> dict[Role, Tensor]:
    """Parts of the codec; `scale`, where it is given, is the outer one.

    With `recode.scale_dtype` the outer scale is rounded to it before the codes are made. Raises
    PlanError when the encoding cannot be written.
    """
    made = _encode(weight_NK, recode, scale)
    if recode.scale_dtype is None:
        return made
    outer = next(role for role in SCALES if role in made)
    rounded = made[outer].to(getattr(torch, recode.scale_dtype))
    if rounded.dtype == made[outer].dtype:
        return made
    return {**_encode(weight_NK, recode, rounded.float()), outer: rounded}


def by_rows(parts: dict[Role, Tensor], recode: Recode) -> dict[Role, Tensor]:
    """The parts with the tensor scale of each row, where the recode wants it so."""
    if Role.CHANNEL_SCALE not in recode.roles or Role.TENSOR_SCALE not in parts:
        return parts
    alone = parts.pop(Role.TENSOR_SCALE)
    rows = len(parts[Role.CODES])
    return {**parts, Role.CHANNEL_SCALE: alone.reshape(1).expand(rows).contiguous()}


def _encode(weight_NK: Tensor, recode: Recode, scale: Tensor | None) -> dict[Role, Tensor]:
    codec = ENCODINGS.load(recode.encoding.name)
    if codec.encode is None:
        raise PlanError(f"nothing writes {recode.encoding}")
    recipe = Recipe(
        granularity=recode.granularity,
        group=recode.group,
        scale=scale,
        arithmetic=recode.arithmetic,
    )
    return codec.encode(weight_NK, recode.encoding, recipe)
