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

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from diffquant.errors import FormatError
from diffquant.formats import Export, Format, Hints, Outgoing, Reading, StoredLayer, StoredPart
from diffquant.formats._outgoing import (
    BIAS,
    DENSE_SPELLING,
    Joined,
    Spelling,
    exported,
    joined,
    naming_of,
    spelled_layer,
)
from diffquant.formats._scales import scale_role
from diffquant.headers import Header, Tensor
from diffquant.plan import (
    DENSE,
    ROW_MAJOR,
    Activation,
    Encoding,
    Layout,
    Plan,
    Role,
    Rotation,
)
from diffquant.sources import Checkpoint

METADATA = "_quantization_metadata"
GLOBAL = "quant_format"
MARKER = ".comfy_quant"
ATTENTION = "comfy_attention.config"
OLD_MARKER = "scaled_fp8"
FULL_PRECISION = "full_precision_matrix_mult"

#: What files put before the names that their metadata uses.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")
NARROW = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8"})

TILES = Layout("tiles_128x4")
TRANSPOSED = Layout("transposed")
NIBBLES_HIGH = Layout("row_major", (("nibbles", "high"),))
GELU_SHIFT = 0.171875

FP8_ENCODINGS = {
    "F8_E4M3": Encoding("fp8"),
    "F8_E5M2": Encoding("fp8", (("kind", "e5m2"),)),
}
FP8_ACTIVATION = Activation(number="fp8", granularity="tensor", mode="dynamic")
INT8_PER_TOKEN = Activation(number="int8", granularity="token", mode="dynamic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One of ComfyUI's formats.

    encodings   by dtype of the codes
    parts       what lies beside the codes: ending -> role and layout; no role: the shape tells it
    packed      codes per stored element along K
    activation  dynamic; it becomes static where an input scale is stored
    rotation    whether the weight is rotated: never, when the marker says so, or always
    smooth      what the input does with a smoothing factor, if one is stored
    """

    encodings: Mapping[str, Encoding]
    parts: Mapping[str, tuple[Role | None, Layout]]
    activation: Activation | None
    codes: Layout = ROW_MAJOR
    packed: int = 1
    rotation: Literal["never", "marked", "always"] = "never"
    smooth: Literal["multiply", "divide"] = "multiply"


FP8 = Kind(
    encodings=FP8_ENCODINGS,
    parts={"weight_scale": (None, ROW_MAJOR), "input_scale": (Role.INPUT_SCALE, ROW_MAJOR)},
    activation=FP8_ACTIVATION,
)
INT8 = Kind(
    encodings={"I8": Encoding("int8")},
    parts={"weight_scale": (None, ROW_MAJOR)},
    activation=INT8_PER_TOKEN,
    rotation="marked",
)
KINDS: Mapping[str, Kind] = {
    "float8_e4m3fn": FP8,
    "float8_e5m2": FP8,
    "nvfp4": Kind(
        encodings={"U8": Encoding("nvfp4")},
        parts={
            "weight_scale": (Role.BLOCK_SCALE, TILES),
            "weight_scale_2": (Role.TENSOR_SCALE, ROW_MAJOR),
            "input_scale": (Role.INPUT_SCALE, ROW_MAJOR),
            "pre_quant_scale": (Role.SMOOTH, ROW_MAJOR),
        },
        activation=Activation(number="nvfp4", granularity="group", group=16, mode="dynamic"),
        codes=NIBBLES_HIGH,
        packed=2,
    ),
    "mxfp8": Kind(
        encodings={
            "F8_E4M3": Encoding("mxfp8"),
            "F8_E5M2": Encoding("mxfp8", (("kind", "e5m2"),)),
        },
        parts={"weight_scale": (Role.BLOCK_SCALE, TILES)},
        activation=Activation(number="mxfp8", granularity="group", group=32, mode="dynamic"),
    ),
    "int8_tensorwise": INT8,
    "int8_blockwise": replace(
        INT8,
        activation=Activation(number="int8", granularity="group", group=128, mode="dynamic"),
        rotation="never",
    ),
    "convrot_w4a4": Kind(
        encodings={"I8": Encoding("int4")},
        parts={"weight_scale": (None, ROW_MAJOR)},
        activation=Activation(number="int4", granularity="token", mode="dynamic"),
        packed=2,
        rotation="always",
    ),
    "asym_w4a8_int8": Kind(
        encodings={"I8": Encoding("asym_w4a8")},
        parts={
            "weight_s_rel": (Role.BLOCK_SCALE, ROW_MAJOR),
            "weight_s_channel": (Role.CHANNEL_SCALE, ROW_MAJOR),
            "weight_codebook": (Role.CODEBOOK, ROW_MAJOR),
            "weight_correction": (Role.CORRECTION, TRANSPOSED),
        },
        activation=INT8_PER_TOKEN,
        packed=2,
        rotation="always",
    ),
    "awq_w4a16": Kind(
        encodings={"I8": Encoding("int4", (("signed", "offset"), ("zero", "scaled")))},
        parts={
            "weight_scale": (Role.BLOCK_SCALE, TRANSPOSED),
            "weight_zeros": (Role.ZERO_POINT, TRANSPOSED),
        },
        activation=None,
        packed=2,
    ),
    "svdquant_w4a4": Kind(
        encodings={"I8": Encoding("int4")},
        parts={
            "weight_scale": (Role.BLOCK_SCALE, TRANSPOSED),
            "weight_proj_down": (Role.LOWRANK_DOWN, TRANSPOSED),
            "weight_proj_up": (Role.LOWRANK_UP, ROW_MAJOR),
            "weight_smooth_factor": (Role.SMOOTH, ROW_MAJOR),
        },
        activation=Activation(number="int4", granularity="group", group=64, mode="dynamic"),
        packed=2,
        smooth="divide",
    ),
}
#: Layers of old files, by the dtype of their codes: some writers use the fp8 names for int8.
OLD_KINDS: Mapping[str, Kind] = {
    "scaled_fp8": replace(
        FP8,
        parts={"scale_weight": (None, ROW_MAJOR), "scale_input": (Role.INPUT_SCALE, ROW_MAJOR)},
    ),
    "scaled_int8": replace(INT8, parts={"scale_weight": (None, ROW_MAJOR)}, rotation="never"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """What a file says of one layer: the format's name, its options, and where it says so."""

    format: str
    where: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def option(self, key: str, default: Any = None) -> Any:
        """An option, at the top of the JSON or in its `params`."""
        inner = self.options.get("params")
        nested = inner.get(key, default) if isinstance(inner, Mapping) else default
        return self.options.get(key, nested)

    def number(self, key: str, default: int) -> int:
        """An option that counts something. Raises FormatError for what is no positive number."""
        found = self.option(key, default)
        if type(found) is not int or found < 1:
            raise FormatError(f"{self.where} says {key} is {found!r:.60}, a number was needed")
        return found

    def contradicts(self, other: "Marker") -> bool:
        shared = self.options.keys() & other.options.keys()
        differ = any(self.options[key] != other.options[key] for key in shared)
        return self.format != other.format or differ


def metadata_layers(header: Header) -> Mapping[str, Any]:
    """The layers that the header's metadata speaks of, {} when it does not speak of any."""
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        block = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"header metadata {METADATA} is not valid JSON: {error}") from None
    layers = block.get("layers") if isinstance(block, Mapping) else None
    return layers if isinstance(layers, Mapping) else {}


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
            return f"{name!r} says {_tensor_marker(name, header).format}"
    for name, said in metadata_layers(header).items():
        return f"header metadata {METADATA} says {name!r} is {_stated(said).get('format')}"
    if header.metadata.get(GLOBAL) in KINDS:
        return f"header metadata {GLOBAL} says {header.metadata[GLOBAL]}"
    old = _old_marker(header)
    return None if old is None else f"the marker {old!r} is stored"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    marked = _markers(header)
    _require_marked(header, marked)
    layers = tuple(layer(name, marker, header) for name, marker in marked.items())
    used = {part.tensor for item in layers for part in item.parts}
    return Reading(layers=layers, unused=dict(_unused(header, marked, used)))


# markers -----------------------------------------------------------------------------------------


def _markers(header: Header) -> dict[str, Marker]:
    """Layer -> what is said of it. Raises FormatError when two places contradict each other."""
    found: dict[str, Marker] = {}
    for source in (_tensor_markers, _metadata_markers, _global_markers, _old_markers):
        for name, marker in source(header):
            other = found.setdefault(name, marker)
            if other.contradicts(marker):
                raise FormatError(
                    f"{name!r} is {other.format} in {other.where} and {marker.format} "
                    f"in {marker.where}, with options that differ"
                    if other.format == marker.format
                    else f"{name!r} is {other.format} in {other.where}, {marker.format} in "
                    f"{marker.where}"
                )
    return found


def _tensor_markers(header: Header) -> Iterator[tuple[str, Marker]]:
    for name in header.tensors:
        if name.endswith(MARKER):
            yield name.removesuffix(MARKER), _tensor_marker(name, header)


def _tensor_marker(name: str, header: Header) -> Marker:
    try:
        said = json.loads(header.read_small(name).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name!r} holds no JSON: {error}") from None
    return _marker(_stated(said), name, name)


def _metadata_markers(header: Header) -> Iterator[tuple[str, Marker]]:
    where = f"header metadata {METADATA}"
    for name, said in metadata_layers(header).items():
        stored = (f"{prefix}{name}" for prefix in PREFIXES)
        full = next((full for full in stored if f"{full}.weight" in header.tensors), name)
        yield full, _marker(_stated(said), where, name)


def _stated(said: Any) -> Mapping[str, Any]:
    """Some writers give the format's name alone."""
    return said if isinstance(said, Mapping) else {"format": said}


def _marker(options: Mapping[str, Any], where: str, name: str) -> Marker:
    stated = options.get("format")
    if not isinstance(stated, str):
        raise FormatError(f"{where} gives no format for {name!r}")
    return Marker(format=stated, where=where, options=options)


def _global_markers(header: Header) -> Iterator[tuple[str, Marker]]:
    stated = header.metadata.get(GLOBAL, "")
    if stated not in KINDS:
        return
    for tensor in _narrow(header):
        name = tensor.name.removesuffix(".weight")
        if f"{name}.weight_scale" in header.tensors:
            yield name, Marker(format=stated, where=f"header metadata {GLOBAL}")


def _old_markers(header: Header) -> Iterator[tuple[str, Marker]]:
    marker = _old_marker(header)
    if marker is None:
        return
    two = header.tensors[marker].shape == (2,)
    for tensor in _narrow(header):
        kind = "scaled_int8" if tensor.dtype == "I8" else "scaled_fp8"
        said = Marker(format=kind, where=repr(marker), options={FULL_PRECISION: two})
        yield tensor.name.removesuffix(".weight"), said


def _old_marker(header: Header) -> str | None:
    names = (f"{prefix}{OLD_MARKER}" for prefix in PREFIXES)
    return next((name for name in names if name in header.tensors), None)


def _narrow(header: Header) -> Iterator[Tensor]:
    """Weights, all but those of norms, that are stored in eight bits or less."""
    for name, tensor in header.tensors.items():
        if name.endswith(".weight") and tensor.dtype in NARROW and len(tensor.shape) > 1:
            yield tensor


def _require_marked(header: Header, marked: Mapping[str, Marker]) -> None:
    for tensor in _narrow(header):
        if tensor.name.removesuffix(".weight") not in marked:
            raise FormatError(
                f"{tensor.name!r} is {tensor.dtype} and nothing says how, while "
                f"{len(marked)} other layers are marked"
            )


# layers ------------------------------------------------------------------------------------------


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


# the way out -------------------------------------------------------------------------------------

WHO = "comfy"
INPUT = Outgoing(role=Role.INPUT_SCALE, tensor="input_scale", dtype="F32")
TENSOR = Outgoing(role=Role.TENSOR_SCALE, tensor="weight_scale", dtype="F32")


def _codes(dtype: str, layout: Layout = ROW_MAJOR) -> Outgoing:
    return Outgoing(role=Role.CODES, tensor="weight", dtype=dtype, layout=layout)


def _tiled(dtype: str) -> Outgoing:
    return Outgoing(role=Role.BLOCK_SCALE, tensor="weight_scale", dtype=dtype, layout=TILES)


def _as_read(name: str, dtype: str) -> Spelling:
    """The spelling that the reader's table already is; a scale of any shape is one per row."""
    kind = KINDS[name]
    beside = (
        Outgoing(role=role or Role.CHANNEL_SCALE, tensor=ending, layout=layout)
        for ending, (role, layout) in kind.parts.items()
    )
    return Spelling(
        parts=(_codes(dtype, kind.codes), *beside, BIAS),
        smooth=kind.smooth,
        lowrank_input="raw",
        rotates=kind.rotation != "never",
    )


#: What ComfyUI's own kernels read of each format; fewer granularities than our reader takes.
SPELLINGS: Mapping[str, Spelling] = {
    "float8_e4m3fn": Spelling(parts=(_codes("F8_E4M3"), TENSOR, INPUT, BIAS)),
    "float8_e5m2": Spelling(parts=(_codes("F8_E5M2"), TENSOR, INPUT, BIAS)),
    "nvfp4": Spelling(
        parts=(
            _codes("U8", NIBBLES_HIGH),
            _tiled("F8_E4M3"),
            Outgoing(role=Role.TENSOR_SCALE, tensor="weight_scale_2", dtype="F32"),
            INPUT,
            Outgoing(role=Role.SMOOTH, tensor="pre_quant_scale"),
            BIAS,
        ),
        smooth="multiply",
        pad=16,
    ),
    "mxfp8": Spelling(parts=(_codes("F8_E4M3"), _tiled("F8_E8M0"), BIAS), pad=32),
    "int8_tensorwise": Spelling(
        parts=(
            _codes("I8"),
            TENSOR,
            Outgoing(role=Role.CHANNEL_SCALE, tensor="weight_scale", dtype="F32", axes="column"),
            BIAS,
        ),
        rotates=True,
    ),
    "int8_blockwise": Spelling(
        parts=(
            _codes("I8"),
            Outgoing(role=Role.BLOCK_SCALE, tensor="weight_scale", dtype="F32"),
            BIAS,
        )
    ),
    "svdquant_w4a4": _as_read("svdquant_w4a4", "I8"),
    "convrot_w4a4": _as_read("convrot_w4a4", "I8"),
    "awq_w4a16": _as_read("awq_w4a16", "I8"),
    "asym_w4a8_int8": _as_read("asym_w4a8_int8", "I8"),
}


def _write(plan: Plan) -> Export:
    naming = naming_of(plan, ("bfl", "original", "diffusers"), WHO)
    weights = joined(plan, naming, WHO)
    return exported(
        plan,
        tuple(spelled_layer(each, _spelling(each), WHO) for each in weights),
        naming,
        config=None,
        metadata={METADATA: json.dumps({"format_version": "1.0", "layers": _said(weights)})},
    )


#: Encoding, a part that must be there, and ComfyUI's word for both. The first row that fits counts.
FORMAT_NAMES: tuple[tuple[str, Role | None, str], ...] = (
    ("fp8", None, "float8_e4m3fn"),
    ("fp8;kind=e5m2", None, "float8_e5m2"),
    ("nvfp4", None, "nvfp4"),
    ("mxfp8", None, "mxfp8"),
    ("int8", Role.BLOCK_SCALE, "int8_blockwise"),
    ("int8", None, "int8_tensorwise"),
    ("int4", Role.LOWRANK_DOWN, "svdquant_w4a4"),
    ("int4", Role.CHANNEL_SCALE, "convrot_w4a4"),
    ("int4;signed=offset;zero=scaled", None, "awq_w4a16"),
    ("asym_w4a8", None, "asym_w4a8_int8"),
)


def _spelling(weight: Joined) -> Spelling | None:
    if weight.piece.encoding == DENSE:
        return DENSE_SPELLING
    return SPELLINGS.get(_format_name(weight))


def _format_name(weight: Joined) -> str:
    """ComfyUI's word for a quantized weight, empty where it has none."""
    piece = weight.piece
    return next(
        (
            name
            for encoding, role, name in FORMAT_NAMES
            if encoding == str(piece.encoding) and (role is None or role in piece.roles)
        ),
        "",
    )


def _said(weights: tuple[Joined, ...]) -> dict[str, dict[str, object]]:
    """Layer -> its marker."""
    said: dict[str, dict[str, object]] = {}
    for weight in weights:
        piece = weight.piece
        if piece.encoding == DENSE:
            continue
        marker: dict[str, object] = {"format": _format_name(weight)}
        if piece.activation is None:
            marker[FULL_PRECISION] = True
        if piece.shift:
            marker["act_unsigned"] = True
        if piece.rotation is not None:
            marker |= {"convrot": True, "convrot_groupsize": piece.rotation.group}
        said[weight.name] = marker
    return said


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    # A file may be marked throughout while all its layers are plain.
    explains=frozenset({"diffusers"}),
    encodings=("fp8", "nvfp4", "mxfp8", "int8", "int4", "asym_w4a8"),
    proof="owner's library",
    write=_write,
)
