"""A(h) of the plan's equation: what quantizing the input does to it, in float32 on any device.

The input is rounded to the numbers a native kernel would multiply. `s` is a scale, one per tensor,
token (row) or group of columns; `static` scales come from the file, `dynamic` ones from the input.

    number               codes                                   scale, dynamic          source
    fp8                  e4m3(h * (448 / amax))                  amax / 448              ModelOpt
    int8                 round(h / s), -128..127                 amax / 127              ModelOpt, Ascend
    int8 asymmetric      round(h / s) + z, -128..127             (max - min) / 255       Ascend, ONNX
    int4 per token       round(h / s), -8..7                     amax / 7                Ascend
    int4 per group       round(h * (1 / s)), -8..7 or 0..15      amax / 7 or max / 15    Nunchaku
    nvfp4                e2m1(h / (b * s)), b = e4m3(amax_16 / (6 * s))   amax / 2688    ModelOpt
    nvfp4;outer=none     e2m1(h / b), b = min(amax_16 / 6, 448)  multiplied as e4m3(b)   Nunchaku
    mxfp8, mxfp4         e4m3 or e2m1 over 2^ceil(log2(amax_32 / largest))               ModelOpt, cuDNN
    mxfp8;exponent=floor the same over 2^(floor(log2(amax_32)) - 8)                      OCP, Ascend
    mxfp4 per 512        h / (amax_512 / 6), then mxfp4;exponent=floor per 32            Ascend

The number of an activation is the canonical string of an encoding, options included. Rounding is to
nearest even and saturates. A zero scale gives zeros.

Halfway cases are common among 16-bit numbers, so the order of operations shows: ModelOpt's fp8
multiplies by the reciprocal of amax, which a static scale gives back as 448 * s, and its nvfp4
multiplies the two scales before the code.

Nunchaku's int4 kernel makes codes with the float32 scale and stores the scale in 16 bits, so the
product uses the rounded one; its input was 16-bit to begin with.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS, Granularity, Recipe
from diffquant.errors import PlanError
from diffquant.plan import Activation, Encoding, Role

GRANULARITIES: Mapping[str, Granularity] = {
    "tensor": "tensor",
    "token": "channel",
    "group": "group",
}


def quantized(x_MK: Tensor, activation: Activation, parts: Mapping[Role, Tensor]) -> Tensor:
    """x_MK rounded to what `activation` can represent, float32.

    Static activations read INPUT_SCALE, asymmetric ones INPUT_ZERO_POINT too. Raises PlanError when
    one is missing or the activation names numbers that cannot be encoded.
    """
    if not activation.symmetric:
        return _asymmetric_int8(x_MK.float(), activation, parts)
    if activation.number == "int4" and activation.granularity == "group":
        return _nunchaku_int4(x_MK, activation)
    if activation.number == "fp8" and activation.granularity != "group":
        return _modelopt_fp8(x_MK.float(), activation, parts)
    encoding = encoding_of(activation)
    codec = ENCODINGS.load(encoding.name)
    if codec.encode is None:
        raise PlanError(f"activations cannot be encoded as {encoding}")
    recipe = Recipe(
        granularity=GRANULARITIES[activation.granularity],
        group=activation.group,
        scale=_stored(Role.INPUT_SCALE, activation, parts),
        unsigned=activation.unsigned,
    )
    encoded = codec.encode(x_MK.float(), encoding, recipe)
    return codec.decode(_joined(encoded, encoding), encoding, (x_MK.shape[0], x_MK.shape[1]))


def encoding_of(activation: Activation) -> Encoding:
    """The encoding an activation's number spells, with what decoding it must know besides."""
    name, *pairs = activation.number.split(";")
    options = dict(pair.split("=", 1) for pair in pairs)
    if activation.unsigned:
        options["signed"] = "false"
    return Encoding(name, tuple(sorted(options.items())))


def _stored(role: Role, activation: Activation, parts: Mapping[Role, Tensor]) -> Tensor | None:
    """The file's number for a static activation, None for a dynamic one."""
    if activation.mode == "dynamic":
        return None
    if role not in parts:
        raise PlanError(f"activation {activation} needs {role}, which the layer does not have")
    return parts[role].float().reshape(())


def _joined(encoded: Mapping[Role, Tensor], encoding: Encoding) -> Mapping[Role, Tensor]:
    """Block scale and tensor scale as one float32 block scale, where there are both."""
    if not {Role.BLOCK_SCALE, Role.TENSOR_SCALE} <= encoded.keys():
        return encoded
    block, outer = encoded[Role.BLOCK_SCALE].float(), encoded[Role.TENSOR_SCALE]
    divides = encoding.option("tensor_scale", "multiply") == "divide"
    joined = block / outer if divides else block * outer
    one = torch.ones_like(encoded[Role.TENSOR_SCALE])
    return {**encoded, Role.BLOCK_SCALE: joined, Role.TENSOR_SCALE: one}


def _modelopt_fp8(x_MK: Tensor, activation: Activation, parts: Mapping[Role, Tensor]) -> Tensor:
    """e4m3(x * (448 / amax)) over 448 / amax; amax of the tensor or of each token."""
    cells = _cells(x_MK, activation)
    static = _stored(Role.INPUT_SCALE, activation, parts)
    amax = _amax(cells) if static is None else static * 448
    # torch makes this reciprocal(amax) * 448, in ModelOpt as here; a true division is an ulp off
    scale = torch.where(amax == 0, 0.0, 448.0 / amax)
    codes = (cells * scale).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return (codes.float() * _over(torch.ones_like(scale), scale)).view(x_MK.shape)


def _nunchaku_int4(x_MK: Tensor, activation: Activation) -> Tensor:
    """Codes from the float32 scale, value from the scale rounded to 16 bits."""
    stored = torch.float16 if x_MK.dtype == torch.float16 else torch.bfloat16
    cells = _cells(x_MK.float(), activation)
    low, high = (0, 15) if activation.unsigned else (-8, 7)
    largest = cells.amax(1, keepdim=True) if activation.unsigned else _amax(cells)
    scale = largest.clamp(min=0) / high
    codes = (cells * _over(torch.ones_like(scale), scale)).round_().clamp_(low, high)
    return codes.mul_(scale.to(stored).float()).view(x_MK.shape)


def _asymmetric_int8(x_MK: Tensor, activation: Activation, parts: Mapping[Role, Tensor]) -> Tensor:
    """(clamp(round(x / s) + z) - z) * s; dynamic s and z make the range, zero included, fit."""
    if activation.number != "int8":
        raise PlanError(f"asymmetric activations are int8, not {activation.number}")
    cells = _cells(x_MK, activation)
    scale = _stored(Role.INPUT_SCALE, activation, parts)
    zero = _stored(Role.INPUT_ZERO_POINT, activation, parts)
    if scale is None or zero is None:
        low = cells.amin(1, keepdim=True).clamp(max=0)
        scale = (cells.amax(1, keepdim=True).clamp(min=0) - low) / 255
        zero = (-128 - _over(low, scale)).round_()
    codes = (_over(cells, scale).round_() + zero).clamp_(-128, 127)
    return ((codes - zero) * scale).view(x_MK.shape)


def _cells(x_MK: Tensor, activation: Activation) -> Tensor:
    """One row per scale. Raises PlanError when groups do not divide the columns."""
    if activation.granularity == "tensor":
        return x_MK.reshape(1, -1)
    columns = x_MK.shape[1]
    length = activation.group if activation.granularity == "group" else columns
    if length is None or columns % length:
        raise PlanError(f"activation {activation} does not divide {columns} columns")
    return x_MK.reshape(-1, length)


def _amax(cells: Tensor) -> Tensor:
    # aminmax along a dimension takes twenty times as long as both
    return torch.maximum(-cells.amin(1, keepdim=True), cells.amax(1, keepdim=True))


def _over(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, values / scale)
