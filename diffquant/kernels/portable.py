"""Weight-only products where float8 is a row of bytes and nothing more.

Apple's GPUs have no float8 at all; AMD's gfx942 has another one (e4m3fnuz) than files hold, and NPUs
differ. So codes and scales are held as bytes and looked up in tables of 256 float32 numbers, made
on the host: no float8 tensor ever reaches the device, and the numbers are exact. The
weight is rounded to the input's dtype and multiplied there. Not run on hardware; on a CPU tests forbid
every operation on float8.
"""

from functools import cache
from typing import TYPE_CHECKING

from diffquant.encodings import ENCODINGS, _e8m0
from diffquant.encodings._scales import decode_rows, grids, group_grid
from diffquant.encodings.fp8 import block_cell, code_dtype, kind
from diffquant.encodings.mxfp8 import GROUP
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

    Decode = Callable[[Parts, Spec], Tensor]


def _build(spec: Spec) -> "Multiply":
    from torch.nn.functional import linear

    decode = DECODERS[spec.encoding.name]
    _host_table(_table_of(spec))

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        return linear(x_MK, decode(parts, spec).to(x_MK.dtype))

    return multiply


def _bytes(parts: "Parts", spec: Spec) -> "dict[Role, Tensor]":
    """Parts of one byte per number as such."""
    import torch

    narrow = {role for role, part in parts.items() if _is_float8(part)}
    return {
        role: part.view(torch.uint8) if role in narrow else part for role, part in parts.items()
    }


def _is_float8(part: "Tensor") -> bool:
    return part.is_floating_point() and part.element_size() == 1


def _fp8(parts: "Parts", spec: Spec) -> "Tensor":
    """Codes by table, times scales of any granularity."""
    scaled = spec.encoding.option("scale", "") != "none"
    scales = grids(parts, spec.shape_NK, block_cell(spec.encoding)) if scaled else ()
    return decode_rows(parts[Role.CODES], _reader(parts, spec), spec.shape_NK, scales)


def _mxfp8(parts: "Parts", spec: Spec) -> "Tensor":
    scale = group_grid(_e8m0.values(parts[Role.BLOCK_SCALE]), spec.shape_NK, GROUP)
    return decode_rows(parts[Role.CODES], _reader(parts, spec), spec.shape_NK, (scale,))


def _fp4(parts: "Parts", spec: Spec) -> "Tensor":
    """The codec itself, which looks codes up; e4m3 scales are looked up for it."""
    held = dict(parts)
    if spec.encoding.name == "nvfp4":
        scale = parts[Role.BLOCK_SCALE]
        held[Role.BLOCK_SCALE] = _looked_up(scale, _table(_table_of(spec), scale.device))
    return ENCODINGS.load(spec.encoding.name).decode(held, spec.encoding, spec.shape_NK)


def _reader(parts: "Parts", spec: Spec) -> "Callable[[Tensor], Tensor]":
    table = _table(_table_of(spec), parts[Role.CODES].device)
    return lambda codes: _looked_up(codes, table)


def _table_of(spec: Spec) -> Encoding:
    """Whose bytes are looked up: those of the codes, or of 4-bit codes' scales, which are e4m3."""
    return Encoding("fp8", (("kind", kind(spec.encoding)),))


def _looked_up(codes: "Tensor", table: "Tensor") -> "Tensor":
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


@cache
def _table(encoding: Encoding, device: "torch.device") -> "Tensor":
    return _host_table(encoding).to(device)


@cache
def _host_table(encoding: Encoding) -> "Tensor":
    """Float32 [256]: what every byte means. The host has every float8."""
    import torch

    # Outside of whatever mode the first call runs in: later ones run in others.
    with torch.inference_mode(False):
        codes = torch.arange(256, dtype=torch.uint8).view(code_dtype(encoding))
        return codes.float()


DECODERS: "dict[str, Decode]" = {"fp8": _fp8, "mxfp8": _mxfp8, "nvfp4": _fp4, "mxfp4": _fp4}

KERNEL = Kernel(
    rank=900,
    needs=Needs(
        encodings=frozenset(DECODERS),
        devices=frozenset({"ascend", "mps", "rocm", "xpu"}),
    ),
    build=_build,
    prepare=_bytes,
    untried=True,
)
