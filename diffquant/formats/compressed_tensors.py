"""compressed-tensors: what llm-compressor writes and vLLM loads, `quant_method: compressed-tensors`.

    format                 X.weight or            X.weight_scale              numbers
                           X.weight_packed
    float-, naive-         F8_E4M3 [N, K]         [1], [N, 1], [N/bn, K/bk]   fp8
    int-, naive-           I8 [N, K]              the same, or [N, K/g]       int8; 4-bit ones too
    pack-quantized         I32 [N, K*b/32]        [1], [N, 1] or [N, K/g]     int4 or int8: b bits,
                                                                              2^(b-1) added
    nvfp4-pack-quantized   U8 [N, K/2]            F8_E4M3 [N, K/16]           nvfp4
    mxfp4-pack-quantized   U8 [N, K/2]            U8 [N, K/32]                mxfp4
    mxfp8-quantized        F8_E4M3 [N, K]         U8 [N, K/32]                mxfp8

Scales multiply, but for two: X.weight_global_scale [1] of nvfp4 and X.input_global_scale [1] are
2688 / amax and divide. X.weight_zero_point is subtracted from the code; beside packed codes it is
packed too, along rows: I32 [N*b/32, K/g]. X.weight_g_idx I32 [K] is the group of every column,
X.weight_shape I64 [2] is N and K. Inputs have X.input_scale and X.input_zero_point [1] if static.

`config_groups` says how many bits, what inputs become and which layers that is for: a target is a
name, `re:` and an expression that a name begins with, or a class; the first kind that hits counts,
in this order. The tensors say which layers are quantized, so `ignore` decides nothing.

Source: compressed-tensors 0.20, whose own compressors wrote the cases it is tested with.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from diffquant import headers
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
from diffquant.headers import Header, Tensor
from diffquant.plan import DENSE, ROW_MAJOR, Activation, Encoding, Layout, Piece, Plan, Recode, Role
from diffquant.sources import Checkpoint

METHOD = "compressed-tensors"
KEYS = ("quantization_config", "compression_config")

#: Ending of the codes, their dtype, whether scales are bare exponents -> encoding.
STORED: Mapping[tuple[str, str, bool], str] = {
    ("weight", "F8_E4M3", False): "fp8",
    ("weight", "F8_E4M3", True): "mxfp8",
    ("weight", "I8", False): "int8",
    ("weight_packed", "I32", False): "int",
    ("weight_packed", "U8", False): "nvfp4",
    ("weight_packed", "U8", True): "mxfp4",
}
NARROW = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8", "I32"})
#: Bits of packed integers -> encoding.
PACKED = {4: "int4", 8: "int8"}
DIVIDES = (("tensor_scale", "divide"),)
SCALE_ROLES: Mapping[str, Role] = {
    "tensor": Role.TENSOR_SCALE,
    "channel": Role.CHANNEL_SCALE,
    "group": Role.BLOCK_SCALE,
    "tensor_group": Role.BLOCK_SCALE,
    "block": Role.BLOCK_SCALE,
}
GRANULARITIES: Mapping[str, Literal["tensor", "token", "group"]] = {
    "tensor": "tensor",
    "token": "token",
    "group": "group",
    "tensor_group": "group",
}
#: What is beside a layer or an attention and is not needed: ending -> why.
IDLE = {
    "weight_shape": "N and K, told by the codes too",
    "output_scale": "declared, not applied: outputs are not quantized",
    "output_zero_point": "declared, not applied: outputs are not quantized",
    "q_scale": "declared, not applied: attention is not quantized",
    "k_scale": "declared, not applied: attention is not quantized",
    "v_scale": "declared, not applied: attention is not quantized",
}
SYMMETRIC = "zeros: the scheme is symmetric"
#: Values of `format` that store something else than this reader knows.
REFUSED = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask", "mxfp6-pack-quantized")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """How one side of a product is quantized, as the configuration spells it.

    group     columns per scale; block: rows and columns per scale
    dynamic   scales come from the values; "local": those of groups do, the one above is stored
    exponents  scales are powers of two
    """

    type: str
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    dynamic: bool | str
    symmetric: bool
    exponents: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One of the configuration's groups; `inputs` is None for weight-only ones."""

    name: str
    targets: tuple[str, ...]
    weights: Arguments
    inputs: Arguments | None


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    found = _declared(checkpoint, header)
    if found is None:
        return None
    where, block = found
    return f"{where} says quant_method {METHOD}, format {block.get('format')}"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    found = _declared(checkpoint, header)
    assert found is not None, "read is called only where evidence was found"
    where, block = found
    _require_known(where, block)
    groups = tuple(_groups(where, block))
    names = tuple(_layer_names(header))
    layers = tuple(_layer(name, header, _group_of(name, groups, where), where) for name in names)
    used = {part.tensor for layer in layers for part in layer.parts}
    return Reading(
        layers=layers,
        unused=dict(_unused(header, names, used)),
        notes=tuple(_notes(block, groups, layers)),
    )


# the configuration -------------------------------------------------------------------------------


def _declared(checkpoint: Checkpoint, header: Header) -> tuple[str, Mapping[str, Any]] | None:
    for key in KEYS:
        blocks = {
            f"config.json {key}": checkpoint.config.get(key),
            f"header metadata {key}": _json(key, header.metadata.get(key)),
        }
        for where, block in blocks.items():
            if isinstance(block, Mapping) and block.get("quant_method") == METHOD:
                return where, block
    return None


def _json(key: str, text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(f"header metadata {key} is not valid JSON") from None


def _require_known(where: str, block: Mapping[str, Any]) -> None:
    """Raises FormatError for what would change the numbers and is not read."""
    sparse = block.get("sparsity_config")
    formats = [block.get("format"), sparse.get("format") if isinstance(sparse, Mapping) else None]
    for name in formats:
        if name in REFUSED:
            raise FormatError(f"{where} stores {name}, which is not read")
    if block.get("transform_config"):
        raise FormatError(f"{where} transforms inputs (transform_config), which is not read")


def _groups(where: str, block: Mapping[str, Any]) -> Iterator[Group]:
    groups = block.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise FormatError(f"{where} has {groups!r:.60} as config_groups, an object was needed")
    for name, group in groups.items():
        at = f"{where} {name}"
        if not isinstance(group, Mapping):
            raise FormatError(f"{at} is {group!r:.60}, an object was needed")
        if group.get("format") in REFUSED:
            raise FormatError(f"{at} stores {group['format']}, which is not read")
        weights, inputs = group.get("weights"), group.get("input_activations")
        if weights is None:
            continue
        yield Group(
            name=name,
            targets=_strings(at, group.get("targets")),
            weights=_arguments(f"{at} weights", weights),
            inputs=None if inputs is None else _arguments(f"{at} input_activations", inputs),
        )


def _strings(where: str, found: Any) -> tuple[str, ...]:
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise FormatError(f"{where} has {found!r:.60} as targets, a list of names was needed")
    return tuple(found)


def _arguments(where: str, block: Any) -> Arguments:
    if not isinstance(block, Mapping):
        raise FormatError(f"{where} is {block!r:.60}, an object was needed")
    bits, group, cell = (block.get(key) for key in ("num_bits", "group_size", "block_structure"))
    if type(bits) is not int or (group is not None and type(group) is not int):
        raise FormatError(f"{where} has num_bits {bits!r:.20} and group_size {group!r:.20}")
    grouped = "channel" if group == -1 else "group"
    return Arguments(
        type=str(block.get("type", "int")),
        bits=bits,
        strategy=str(block.get("strategy") or ("tensor" if group is None else grouped)),
        group=group,
        block=_cell(where, cell),
        dynamic=block.get("dynamic") or False,
        symmetric=block.get("symmetric") is not False,
        exponents="uint8" in str(block.get("scale_dtype")),
    )


def _cell(where: str, found: Any) -> tuple[int, int] | None:
    """Rows and columns of a block: [128, 128], in older files "128x128"."""
    sides = found.split("x") if isinstance(found, str) else found
    if sides is None:
        return None
    try:
        rows, columns = (int(side) for side in sides)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise FormatError(f"{where} has {found!r:.60} as block_structure, [N, K] was needed")
    return rows, columns


def _group_of(layer: str, groups: Sequence[Group], where: str) -> Group:
    """The group whose target hits: by name, by expression, by class. A lone group needs no target,
    for some writers spell its layers as their own runtime does."""
    linear = ("Linear", "LinearBase")
    for hits in (
        lambda target: target == layer,
        lambda target: target.startswith("re:") and _expression(target, where).match(layer),
        lambda target: target in linear,
        lambda target: len(groups) == 1,
    ):
        found = [group for group in groups if any(map(hits, group.targets))]
        if found:
            return found[0]
    raise FormatError(f"{layer!r} is stored quantized, and no target in {where} hits it")


def _expression(target: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise FormatError(f"{where} has the target {target!r:.60}: {error}") from None


# layers ------------------------------------------------------------------------------------------


def _layer_names(header: Header) -> Iterator[str]:
    for name, tensor in header.tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight_packed" or (leaf == "weight" and tensor.dtype in NARROW):
            yield stem


def _layer(name: str, header: Header, group: Group, where: str) -> StoredLayer:
    leaf = "weight_packed" if f"{name}.weight_packed" in header.tensors else "weight"
    codes, scale = header.tensors[f"{name}.{leaf}"], header.tensors.get(f"{name}.weight_scale")
    exponents = scale is not None and scale.dtype in ("U8", "F8_E8M0")
    kind = STORED.get((leaf, codes.dtype, exponents))
    if kind is None or len(codes.shape) != 2:
        raise FormatError(
            f"{codes.name!r} is {codes.dtype} of {list(codes.shape)}, which {METHOD} does not store"
        )
    encoding, stored_NK, layout = _numbers(kind, codes, group, header)
    parts = [StoredPart(Role.CODES, codes.name, layout)]
    if scale is not None:
        parts.append(StoredPart(_scale_role(scale, stored_NK, group), scale.name))
    parts += _beside(name, encoding, header, group)
    roles = {part.role for part in parts}
    return StoredLayer(
        name=name,
        stored_NK=stored_NK,
        encoding=encoding,
        parts=tuple(parts),
        activation=None if group.inputs is None else _activation(group.inputs, roles, where),
        why=f"{where} {group.name}",
    )


def _numbers(
    kind: str, codes: Tensor, group: Group, header: Header
) -> tuple[Encoding, tuple[int, int], Layout]:
    """Encoding, logical shape and physical order of the codes."""
    rows, columns = codes.shape
    if kind == "int":
        bits = group.weights.bits
        if bits not in PACKED:
            raise FormatError(f"{codes.name!r} holds {bits}-bit integers; 4 and 8 are read")
        shape = _stored_shape(codes, header) or (rows, columns * 32 // bits)
        return Encoding(PACKED[bits]), shape, _words(bits, "columns")
    if kind == "nvfp4":
        return Encoding(kind, DIVIDES), (rows, 2 * columns), ROW_MAJOR
    if kind == "mxfp4":
        return Encoding(kind), (rows, 2 * columns), ROW_MAJOR
    cell = group.weights.block
    blocks = () if cell is None or cell == (128, 128) else (("block", f"{cell[0]}x{cell[1]}"),)
    return Encoding(kind, blocks), (rows, columns), ROW_MAJOR


def _stored_shape(codes: Tensor, header: Header) -> tuple[int, int] | None:
    """N and K as X.weight_shape tells them; None without it, or in a header that is yet to be."""
    name = f"{codes.name.removesuffix('_packed')}_shape"
    if name not in header.tensors or not header.files:
        return None
    raw = header.read_small(name)
    half = len(raw) // 2
    rows, columns = (int.from_bytes(each, "little") for each in (raw[:half], raw[half:]))
    return rows, columns


def _words(bits: int, axis: str) -> Layout:
    return Layout("words", (("axis", axis), ("bits", str(bits)), ("numbers", "offset")))


def _scale_role(scale: Tensor, stored_NK: tuple[int, int], group: Group) -> Role:
    """As the strategy says. Raises FormatError where the shape says something else."""
    n, k = stored_NK
    arguments = group.weights
    role = SCALE_ROLES.get(arguments.strategy)
    if role is None:
        raise FormatError(f"{group.name} quantizes weights per {arguments.strategy}")
    rows, columns = arguments.block or (1, arguments.group or k)
    counts = {Role.TENSOR_SCALE: 1, Role.CHANNEL_SCALE: n}
    wanted = counts.get(role, -(-n // rows) * -(-k // columns))
    if prod(scale.shape) != wanted:
        raise FormatError(
            f"{scale.name!r} has shape {list(scale.shape)}, one scale per {arguments.strategy} of "
            f"{list(stored_NK)} are {wanted}"
        )
    return role


def _beside(name: str, encoding: Encoding, header: Header, group: Group) -> Iterator[StoredPart]:
    """What else the layer has; zero points of a symmetric scheme are zeros."""
    inputs = group.inputs
    wanted: dict[str, Role] = {
        "weight_global_scale": Role.TENSOR_SCALE,
        "bias": Role.BIAS,
    }
    if not group.weights.symmetric:
        wanted["weight_zero_point"] = Role.ZERO_POINT
    if inputs is not None and inputs.dynamic is not True:
        wanted |= {"input_scale": Role.INPUT_SCALE, "input_global_scale": Role.INPUT_SCALE}
        if not inputs.symmetric:
            wanted["input_zero_point"] = Role.INPUT_ZERO_POINT
    for ending, role in wanted.items():
        tensor = header.tensors.get(f"{name}.{ending}")
        if tensor is not None:
            packed = role is Role.ZERO_POINT and tensor.dtype == "I32"
            layout = _words(group.weights.bits, "rows") if packed else ROW_MAJOR
            yield StoredPart(role, tensor.name, layout)
    yield from _column_order(name, encoding, header)


def _column_order(name: str, encoding: Encoding, header: Header) -> Iterator[StoredPart]:
    """The group of every column, where any is out of order: -1 everywhere means none is."""
    index = header.tensors.get(f"{name}.weight_g_idx")
    if index is None or not header.read_small(index.name).strip(b"\xff"):
        return
    if encoding.name != "int4":
        raise FormatError(f"{index.name!r} reorders columns, which is read for int4 only")
    yield StoredPart(Role.GROUP_INDEX, index.name)


def _activation(arguments: Arguments, roles: set[Role], where: str) -> Activation:
    """What inputs become. A static scheme whose scale is not stored is dynamic."""
    number, granularity = _number(arguments), GRANULARITIES.get(arguments.strategy)
    if number is None or granularity is None:
        raise FormatError(
            f"{where} has inputs of {arguments.bits}-bit {arguments.type} per "
            f"{arguments.strategy}, which is not known"
        )
    static = Role.INPUT_SCALE in roles
    if number == "nvfp4" and static:
        number = str(Encoding(number, DIVIDES))
    return Activation(
        number=number,
        granularity=granularity,
        group=arguments.group if granularity == "group" else None,
        mode="static" if static else "dynamic",
        symmetric=arguments.symmetric,
    )


def _number(arguments: Arguments) -> str | None:
    """The name of the numbers. How runtimes round exponents of inputs is not the file's to say."""
    numbers = {("float", 8): "fp8", ("float", 4): "nvfp4", ("int", 8): "int8", ("int", 4): "int4"}
    if arguments.type == "float" and arguments.exponents:
        return f"mxfp{arguments.bits}" if arguments.bits in (4, 8) else None
    return numbers.get((arguments.type, arguments.bits))


# what is left over -------------------------------------------------------------------------------


def _unused(header: Header, layers: Sequence[str], used: set[str]) -> Iterator[tuple[str, str]]:
    quantized = set(layers)
    for name in header.tensors:
        stem, _, leaf = name.rpartition(".")
        if name in used:
            continue
        if leaf in IDLE:
            yield name, IDLE[leaf]
        elif leaf in ("weight_zero_point", "input_zero_point"):
            yield name, SYMMETRIC
        elif leaf == "weight_g_idx" and stem in quantized:
            yield name, "-1 everywhere: columns are in order"
        elif leaf in ("weight_scale", "input_scale", "input_global_scale"):
            dense = "the weight is stored as it was" if stem not in quantized else "inputs are not"
            yield name, f"declared, not applied: {dense}"


def _notes(
    block: Mapping[str, Any], groups: Sequence[Group], layers: Sequence[StoredLayer]
) -> Iterator[str]:
    if block.get("kv_cache_scheme"):
        yield "attention quantizers are declared (kv_cache_scheme), and not applied"
    if not layers:
        yield f"the configuration says {METHOD}, but no weight in the file is quantized"
    wanted = {group.name for group in groups if group.inputs and group.inputs.dynamic is not True}
    lacking = [
        layer.name
        for layer in layers
        if layer.why.rpartition(" ")[2] in wanted
        and layer.activation is not None
        and layer.activation.mode == "dynamic"
    ]
    if lacking:
        yield f"{len(lacking)} layers lack input_scale and quantize dynamically, first {lacking[0]!r}"


# the way out -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How the dialect stores one kind of weight.

    grouping  strategy and group where the format leaves no choice
    packed    bits per code in words, which come with X.weight_shape
    """

    format: str
    type: str
    bits: int
    codes: Outgoing
    grouping: Mapping[str, object] | None = None
    scale_dtype: str | None = None
    packed: int | None = None


def _words_of(bits: int) -> Outgoing:
    layout = _words(bits, "columns")
    return Outgoing(role=Role.CODES, tensor="weight_packed", dtype="I32", layout=layout)


PAIRS = Outgoing(role=Role.CODES, tensor="weight_packed", dtype="U8")
FLOAT8 = Outgoing(role=Role.CODES, tensor="weight", dtype="F8_E4M3")
INT8 = Outgoing(role=Role.CODES, tensor="weight", dtype="I8")
PER_32: Mapping[str, object] = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
PER_16: Mapping[str, object] = {
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}

#: Encoding (without the size of its blocks) and whether inputs are quantized.
STORAGES: Mapping[tuple[str, bool], Storage] = {
    ("fp8", True): Storage(format="float-quantized", type="float", bits=8, codes=FLOAT8),
    ("fp8", False): Storage(format="naive-quantized", type="float", bits=8, codes=FLOAT8),
    ("int8", True): Storage(format="int-quantized", type="int", bits=8, codes=INT8),
    ("int8", False): Storage(
        format="pack-quantized", type="int", bits=8, codes=_words_of(8), packed=8
    ),
} | {
    (name, inputs): storage
    for inputs in (True, False)
    for name, storage in {
        "int4": Storage(format="pack-quantized", type="int", bits=4, codes=_words_of(4), packed=4),
        str(Encoding("nvfp4", DIVIDES)): Storage(
            format="nvfp4-pack-quantized",
            type="float",
            bits=4,
            codes=PAIRS,
            grouping=PER_16,
            scale_dtype="F8_E4M3",
        ),
        "mxfp4": Storage(
            format="mxfp4-pack-quantized",
            type="float",
            bits=4,
            codes=PAIRS,
            grouping=PER_32,
            scale_dtype="U8",
        ),
        "mxfp8": Storage(
            format="mxfp8-quantized",
            type="float",
            bits=8,
            codes=FLOAT8,
            grouping=PER_32,
            scale_dtype="U8",
        ),
    }.items()
}
#: An activation's number -> how the configuration spells it.
INPUTS: Mapping[str, Mapping[str, object]] = {
    "fp8": {"type": "float", "num_bits": 8},
    "int8": {"type": "int", "num_bits": 8},
    "int4": {"type": "int", "num_bits": 4},
    "nvfp4": {"type": "float", "num_bits": 4, **PER_16},
    "mxfp8": {"type": "float", "num_bits": 8, **PER_32},
    "mxfp4": {"type": "float", "num_bits": 4, **PER_32},
}


def _write(plan: Plan) -> Export:
    naming = naming_of(plan, ("diffusers",), METHOD)
    weights = joined(plan, naming, METHOD)
    groups = _Groups(plan)
    layers = tuple(spelled_layer(each, groups.spelling(each), METHOD) for each in weights)
    export = exported(plan, layers, naming, config={KEYS[0]: groups.block()})
    return replace(export, constants=groups.shapes)


class _Groups:
    """The configuration's groups, which fill as weights are spelled."""

    def __init__(self, plan: Plan) -> None:
        self._stored = headers.read([Path(file.path) for file in plan.files])
        self._pieces = {layer.path: layer.pieces for layer in plan.layers}
        self._members: dict[str, list[str]] = {}
        self._dense: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def spelling(self, weight: Joined) -> Spelling | None:
        piece = weight.piece
        if piece.encoding == DENSE:
            self._dense.append(weight.name)
            return DENSE_SPELLING
        bare = tuple(item for item in piece.encoding.options if item[0] != "block")
        key = (str(Encoding(piece.encoding.name, bare)), piece.activation is not None)
        storage = STORAGES.get(key)
        if storage is None:
            _require_inverse(weight)
            return None
        grouping = storage.grouping or self._grouping(weight)
        _require_whole_groups(weight, grouping)
        symmetric = Role.ZERO_POINT not in piece.roles
        group = {
            "format": storage.format,
            "weights": {
                "num_bits": storage.bits,
                "type": storage.type,
                "symmetric": symmetric,
                "dynamic": False,
                **grouping,
            },
            "input_activations": _inputs(weight.name, piece),
        }
        self._members.setdefault(json.dumps(group), []).append(weight.name)
        if storage.packed is not None:
            self.shapes[f"{weight.name}.weight_shape"] = self._shape(weight)
        return Spelling(parts=_parts(storage, piece, str(grouping["strategy"])))

    def block(self) -> dict[str, object]:
        """One group takes every linear that is not ignored; several name their layers."""
        groups = [(json.loads(text), names) for text, names in self._members.items()]
        formats = {group["format"] for group, _ in groups} or {"dense"}
        alone = len(groups) == 1
        return {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {"targets": ["Linear"] if alone else names, **group}
                for index, (group, names) in enumerate(groups)
            },
            "ignore": self._dense,
        }

    def _shape(self, weight: Joined) -> tuple[int, ...]:
        rows = (len(self._pieces[path][index].out) for path, index in weight.members)
        return sum(rows), len(weight.piece.cols)

    def _grouping(self, weight: Joined) -> dict[str, object]:
        """Strategy and sizes. Raises FormatError for scales upon scales, and for ragged groups."""
        roles = weight.piece.roles & set(SCALE_ROLES.values())
        if len(roles) != 1:
            raise FormatError(f"{weight.name!r} has {len(roles)} scales, {METHOD} stores one")
        (role,) = roles
        if role is not Role.BLOCK_SCALE:
            return {"strategy": "tensor" if role is Role.TENSOR_SCALE else "channel"}
        path, index = weight.members[0]
        piece = self._pieces[path][index]
        if piece.recode is not None:
            return _recoded(piece.recode)
        return self._blocks(weight.name, piece)

    def _blocks(self, name: str, piece: Piece) -> dict[str, object]:
        """By how many scales are stored: one per block of rows and columns, or per group."""
        n, k = piece.stored_NK
        part = piece.part(Role.BLOCK_SCALE)
        assert part is not None, "it is one of the piece's roles"
        count = prod(self._stored.tensors[part.ref.name].shape)
        rows, columns = map(int, piece.encoding.option("block", "128x128").split("x"))
        if piece.encoding.name in ("fp8", "int8") and count == -(-n // rows) * -(-k // columns):
            return {"strategy": "block", "block_structure": [rows, columns]}
        if n * k % count or count % n:
            raise FormatError(
                f"{name!r} has {count} scales for {[n, k]}, no whole groups of columns"
            )
        return {"strategy": "group", "group_size": n * k // count}


def _require_inverse(weight: Joined) -> None:
    if weight.piece.encoding == Encoding("nvfp4"):
        raise FormatError(
            f"{weight.name!r} has a tensor scale that multiplies, {METHOD} stores its inverse, which "
            "no float32 is exactly",
            hint="build_modelopt_nvfp4_transformer --from-bf16 --dialect compressed_tensors makes one",
        )


def _require_whole_groups(weight: Joined, grouping: Mapping[str, object]) -> None:
    group, k = grouping.get("group_size"), len(weight.piece.cols)
    if isinstance(group, int) and k % group:
        raise FormatError(f"{weight.name!r} has K {k}, {METHOD} needs whole groups of {group}")


def _recoded(recode: Recode) -> dict[str, object]:
    if recode.granularity == "block":
        return {"strategy": "block", "block_structure": [recode.group or 128] * 2}
    return {"strategy": "group", "group_size": recode.group}


def _parts(storage: Storage, piece: Piece, strategy: str) -> tuple[Outgoing, ...]:
    column: Literal["column"] | None = "column" if strategy == "channel" else None
    scale = Outgoing(
        role=SCALE_ROLES[strategy],
        tensor="weight_scale",
        dtype=storage.scale_dtype,
        axes="one" if strategy == "tensor" else column,
    )
    outer = Outgoing(role=Role.TENSOR_SCALE, tensor="weight_global_scale", dtype="F32", axes="one")
    zeros = Outgoing(role=Role.ZERO_POINT, tensor="weight_zero_point", dtype="I8", axes=column)
    if storage.packed is not None:
        layout = _words(storage.packed, "rows")
        zeros = replace(zeros, dtype="I32", layout=layout, axes=None)
    number = "" if piece.activation is None else piece.activation.number.partition(";")[0]
    told = "input_global_scale" if number == "nvfp4" else "input_scale"
    return (
        storage.codes,
        scale,
        *((outer,) if strategy == "tensor_group" else ()),
        zeros,
        Outgoing(role=Role.GROUP_INDEX, tensor="weight_g_idx", dtype="I32"),
        Outgoing(role=Role.INPUT_SCALE, tensor=told, dtype="F32", axes="one"),
        Outgoing(role=Role.INPUT_ZERO_POINT, tensor="input_zero_point", dtype="I8", axes="one"),
        BIAS,
    )


def _inputs(name: str, piece: Piece) -> dict[str, object] | None:
    activation = piece.activation
    if activation is None:
        return None
    number, _, options = activation.number.partition(";")
    if number not in INPUTS or options not in ("", "tensor_scale=divide"):
        raise FormatError(f"{name!r} has inputs {activation}, for which {METHOD} has no word")
    spelled = {"strategy": activation.granularity, "group_size": activation.group, **INPUTS[number]}
    return {
        **spelled,
        "symmetric": activation.symmetric,
        "dynamic": _dynamic(activation),
    }


def _dynamic(activation: Activation) -> bool | str:
    """Groups under a stored scale quantize by themselves: that is `local`."""
    if activation.mode == "dynamic":
        return True
    return "local" if activation.granularity == "group" else False


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("fp8", "int8", "int4", "nvfp4", "mxfp4", "mxfp8"),
    proof="owner's library",
    write=_write,
)
