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

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, Literal

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._compressed_tensors_config import (
    DIVIDES,
    METHOD,
    SCALE_ROLES,
    Arguments,
    Group,
    declared,
    group_of,
    groups_of,
    require_known,
    words,
)
from diffquant.formats._compressed_tensors_written import write
from diffquant.headers import Header, Tensor
from diffquant.plan import ROW_MAJOR, Activation, Encoding, Layout, Role
from diffquant.sources import Checkpoint

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


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    found = declared(checkpoint, header)
    if found is None:
        return None
    where, block = found
    return f"{where} says quant_method {METHOD}, format {block.get('format')}"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    found = declared(checkpoint, header)
    assert found is not None, "read is called only where evidence was found"
    where, block = found
    require_known(where, block)
    groups = tuple(groups_of(where, block))
    names = tuple(_layer_names(header))
    layers = tuple(_layer(name, header, group_of(name, groups, where), where) for name in names)
    used = {part.tensor for layer in layers for part in layer.parts}
    return Reading(
        layers=layers,
        unused=dict(_unused(header, names, used)),
        notes=tuple(_notes(block, groups, layers)),
    )


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
        return Encoding(PACKED[bits]), shape, words(bits, "columns")
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
            layout = words(group.weights.bits, "rows") if packed else ROW_MAJOR
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


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("fp8", "int8", "int4", "nvfp4", "mxfp4", "mxfp8"),
    proof="owner's library",
    write=write,
)
