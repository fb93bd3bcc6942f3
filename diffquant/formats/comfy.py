"""ComfyUI's files: every quantized layer says by itself what it is, in one of four places.

    X.comfy_quant                                    U8, JSON: {"format": "nvfp4", ...}
    header metadata _quantization_metadata           JSON: {"layers": {X: {"format": ...} or a name}}
    header metadata quant_format                     one name for all layers (mxfp8)
    scaled_fp8, behind the prefix of all names       the old way: X.scale_weight, X.scale_input

Two places may speak of one layer as long as they agree. A prefix may be missing in the second.

    format              X.weight             beside it                              activation
    float8_e4m3fn|e5m2  F8 [N, K]            weight_scale, input_scale              fp8 per tensor
    nvfp4               U8 [N, K/2]          weight_scale in tiles, weight_scale_2, nvfp4
                        even column high     input_scale, pre_quant_scale
    mxfp8               F8 [N, K]            weight_scale in tiles                  mxfp8
    int8_tensorwise     I8 [N, K]            weight_scale () or [N, 1]; convrot     int8 per token
    int8_blockwise      I8 [N, K]            weight_scale [N/128, K/128]            int8 per group
    convrot_w4a4        I8 [N, K/2] signed   weight_scale [N]; rotated              int4 per token
    asym_w4a8_int8      I8 [N, K/2]          weight_s_rel, weight_s_channel,        int8 per token
                                             codebook, correction; rotated
    awq_w4a16           I8 [N, K/2]          weight_scale, weight_zeros [K/64, N]   none
    svdquant_w4a4       I8 [N, K/2] signed   weight_scale [K/64, N], proj_down,     int4 groups of 64
                                             proj_up, smooth_factor (divides)

Scales multiply. N and K are padded to 16 (nvfp4) and 32 (mxfp8), scales on top of that to whole
tiles; mxfp8 scales are in tiles even where their shape is the plain one. A layer marked
full_precision_matrix_mult (old files: a scaled_fp8 marker of two elements) has no activation.
Rotated weights lie in the basis of a regular Hadamard transform over groups of columns.

Sources: ComfyUI (comfy/ops.py, comfy/utils.py), comfy-kitchen 0.2.40, whose own files are tested.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._comfy_kinds import INT8_PER_TOKEN, KINDS, OLD_KINDS, Kind
from diffquant.formats._comfy_markers import (
    FULL_PRECISION,
    GLOBAL,
    MARKER,
    METADATA,
    OLD_MARKER,
    Marker,
    markers,
    metadata_layers,
    narrow,
    old_marker,
    options_of,
    tensor_marker,
)
from diffquant.formats._comfy_written import write
from diffquant.formats._scales import scale_role
from diffquant.headers import Header, Tensor
from diffquant.plan import Activation, Role, Rotation
from diffquant.sources import Checkpoint

ATTENTION = "comfy_attention.config"
GELU_SHIFT = 0.171875


def layer(name: str, marker: Marker, header: Header) -> StoredLayer:
    """One marked layer. Raises FormatError where the tensors contradict the marker.

    A tensor that should be there and is not is left out: the planner names what it misses.
    """
    kind = _kind(name, marker)
    weight = _weight(name, marker, header)
    encoding = kind.encodings.get(weight.dtype)
    if encoding is None:
        raise FormatError(
            f"{weight.name!r} is {weight.dtype}, {marker.where} says {marker.format}, "
            f"which has {' or '.join(kind.encodings)} codes"
        )
    parts = tuple(_parts(name, kind, marker, header, weight))
    roles = {part.role for part in parts}
    return StoredLayer(
        name=name,
        stored_NK=_stored_NK(name, kind, marker, header, weight),
        encoding=encoding,
        parts=parts,
        activation=_activation(kind, marker, roles),
        smooth=kind.smooth if Role.SMOOTH in roles else None,
        rotation=_rotation(kind, marker),
        lowrank_input="raw" if Role.LOWRANK_DOWN in roles else None,
        gelu_shift=GELU_SHIFT if marker.option("act_unsigned") else 0.0,
        why=f"{marker.where} says {marker.format}",
    )


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    for name in header.tensors:
        if name.endswith(MARKER):
            return f"{name!r} says {tensor_marker(name, header).format}"
    for name, said in metadata_layers(header).items():
        return f"header metadata {METADATA} says {name!r} is {options_of(said).get('format')}"
    if header.metadata.get(GLOBAL) in KINDS:
        return f"header metadata {GLOBAL} says {header.metadata[GLOBAL]}"
    old = old_marker(header)
    return None if old is None else f"the marker {old!r} is stored"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    marked = markers(header)
    _require_marked(header, marked)
    layers = tuple(layer(name, marker, header) for name, marker in marked.items())
    used = {part.tensor for item in layers for part in item.parts}
    return Reading(layers=layers, unused=dict(_unused(header, marked, used)))


def _require_marked(header: Header, marked: Mapping[str, Marker]) -> None:
    for tensor in narrow(header):
        if tensor.name.removesuffix(".weight") not in marked:
            raise FormatError(
                f"{tensor.name!r} is {tensor.dtype} and nothing says how, while "
                f"{len(marked)} other layers are marked"
            )


def _kind(name: str, marker: Marker) -> Kind:
    if marker.option("num_experts"):
        raise FormatError(
            f"{name!r} is a stack of {marker.option('num_experts')} experts, which is not read",
            hint="diffquant runs diffusion transformers without expert layers",
        )
    kind = KINDS.get(marker.format) or OLD_KINDS.get(marker.format)
    if kind is None:
        raise FormatError(
            f"{name!r} is {marker.format!r} in {marker.where}, a format that is not known",
            hint=f"known are: {', '.join(KINDS)}",
        )
    return kind


def _weight(name: str, marker: Marker, header: Header) -> Tensor:
    weight = header.tensors.get(f"{name}.weight")
    if weight is None:
        raise FormatError(f"{marker.where} speaks of {name!r}, of which no weight is stored")
    if len(weight.shape) < 2:
        raise FormatError(
            f"{weight.name!r} is {marker.format} and has shape {list(weight.shape)}, not [N, K]"
        )
    return weight


def _parts(
    name: str, kind: Kind, marker: Marker, header: Header, weight: Tensor
) -> Iterator[StoredPart]:
    yield StoredPart(Role.CODES, weight.name, kind.codes)
    for ending, (role, layout) in kind.parts.items():
        tensor = header.tensors.get(f"{name}.{ending}")
        if tensor is None or _is_idle(role, marker, header, tensor):
            continue
        yield StoredPart(role or scale_role(tensor, weight.shape[0]), tensor.name, layout)


def _is_idle(role: Role | None, marker: Marker, header: Header, tensor: Tensor) -> bool:
    """Whether an input scale has nothing to do: inputs stay as they are, or it says nothing."""
    if role is not Role.INPUT_SCALE:
        return False
    return bool(marker.option(FULL_PRECISION)) or _is_placeholder(header, tensor)


def _is_placeholder(header: Header, tensor: Tensor) -> bool:
    """Old writers store 1.0 where nobody measured the input."""
    if not tensor.name.endswith(".scale_input"):
        return False
    return header.read_small(tensor.name) in (struct.pack("<f", 1.0), b"\x80\x3f", b"\x00\x3c")


def _stored_NK(
    name: str, kind: Kind, marker: Marker, header: Header, weight: Tensor
) -> tuple[int, int]:
    # A convolution's weight is a matrix of N filters; the planner decodes it.
    rows, width = weight.shape[0], prod(weight.shape[1:])
    columns = width * kind.packed
    groups = header.tensors.get(f"{name}.weight_s_rel")
    if groups is not None and "weight_s_rel" in kind.parts:
        told = prod(groups.shape[-1:]) * marker.number("group_size", 16)
        if told != columns:
            raise FormatError(
                f"{weight.name!r} has {width} bytes for {told} columns: codes of "
                f"{8 * width // max(told, 1)} bits, 4 are read"
            )
    return rows, columns


def _activation(kind: Kind, marker: Marker, roles: set[Role]) -> Activation | None:
    if kind.activation is None or marker.option(FULL_PRECISION):
        return None
    if marker.option("linear_dtype") == "int8":
        return INT8_PER_TOKEN
    if Role.INPUT_SCALE in roles:
        return replace(kind.activation, mode="static")
    return kind.activation


def _rotation(kind: Kind, marker: Marker) -> Rotation | None:
    rotated = kind.rotation == "always" or (
        kind.rotation == "marked" and bool(marker.option("convrot"))
    )
    if not rotated:
        return None
    return Rotation("regular_hadamard", marker.number("convrot_groupsize", 256))


def _unused(
    header: Header, marked: Mapping[str, Marker], used: set[str]
) -> Iterator[tuple[str, str]]:
    for name in header.tensors:
        layer_name, _, ending = name.rpartition(".")
        if name.endswith((MARKER, OLD_MARKER)):
            yield name, "a marker, read"
        elif name.endswith(ATTENTION):
            yield name, "chooses an attention kernel of ComfyUI's and stores no weight"
        elif ending in ("input_scale", "scale_input") and layer_name in marked and name not in used:
            yield name, "an input scale of a layer whose inputs are not quantized by it"


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    # A file may be marked throughout while all its layers are plain.
    explains=frozenset({"diffusers"}),
    encodings=("fp8", "nvfp4", "mxfp8", "int8", "int4", "asym_w4a8"),
    proof="owner's library",
    write=write,
)
