"""SDNQ: what SD.Next and its library save, `quant_method: sdnq`.

    weights_dtype         X.weight                X.scale               X.zero_point
    int8                  I8 [N, K]               [N, 1]                none
    float8_e4m3fn, _e5m2  F8 [N, K]               [N, 1]                none
    the same, in groups   I8 or F8 [N, G, K / G]  [N, G, 1]             none
    int4                  U8 [N * K / 2]          [N, 1] or [N, G, 1]   none: 8 was added to the codes
    uint4                 U8 [N * K / 2]          the same              the same: weight = code * scale + it

Four bits run over the flattened weight, the earlier number in the low nibble. With `use_quantized_matmul`
whole codes may be stored [K, N] and their scale [1, N]. X.svd_up [N, R] and X.svd_down [R, K], or both
transposed, are a low-rank branch beside the weight. Inputs are as they are: products of quantized ones are
a choice of the library's kernels. Other numbers, rotated weights (`use_hadamard`), codebooks and scales
that are quantized again are refused by name.

Proof is the configuration, in config.json or in quantization_config.json beside the weights. Source:
files and decoded weights of SDNQ 0.2.8; none of its code is here, and it is not needed to read them.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._json import blocks, json_object, said_by
from diffquant.headers import Header, Tensor
from diffquant.plan import ROW_MAJOR, Encoding, Layout, Role
from diffquant.sources import Checkpoint

METHOD = "sdnq"
SIDE = "quantization_config.json"
TRANSPOSED = Layout("transposed")
WHOLE: Mapping[str, Encoding] = {
    "I8": Encoding("int8"),
    "F8_E4M3": Encoding("fp8"),
    "F8_E5M2": Encoding("fp8", (("kind", "e5m2"),)),
}
#: Four-bit numbers -> how their codes are meant.
PACKED = {
    "int4": (("signed", "offset"),),
    "uint4": (("signed", "false"), ("zero", "scaled")),
}
#: Numbers that are stored as one run of bytes, like those of `PACKED`.
RUNS = frozenset({*PACKED, "int2", "uint2", "float4_e2m1fn", "float4_e1m2fn", "float4_e3m0fn"})
#: What would change numbers or their basis.
REFUSED = ("use_hadamard", "use_codebook", "use_codebook_scale")
#: Tensors of scales that are quantized again.
SECOND = ("scale_2", "scale_zero_point", "zero_point_scale", "zero_point_2", "hadamard")


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    for where, _ in _declared(checkpoint, header):
        return f"{where} says quant_method {METHOD}"
    return None


def _declared(checkpoint: Checkpoint, header: Header) -> Iterator[tuple[str, Mapping[str, Any]]]:
    found = blocks(checkpoint, header, "quantization_config")
    yield from said_by(found, METHOD)
    if SIDE in checkpoint.sidecars and not found:
        block = json_object(checkpoint.sidecars[SIDE].read_text("utf-8"), SIDE)
        if block.get("quant_method") == METHOD:
            yield SIDE, block


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    where, block = next(iter(_declared(checkpoint, header)))
    _require_plain_basis(where, block)
    numbers = frozenset(_numbers(block))
    layers = tuple(
        _layer(tensor, header, numbers, where)
        for name, tensor in header.tensors.items()
        if name.endswith(".weight") and (tensor.dtype in WHOLE or tensor.dtype == "U8")
    )
    return Reading(layers=layers)


def _require_plain_basis(where: str, block: Mapping[str, Any]) -> None:
    """Raises FormatError for rotations and codebooks, of all layers or of some."""
    for key in REFUSED:
        if block.get(key):
            raise FormatError(f"{where} says {key}, which is not read")
    for name, inner in (block.get("modules_quant_config") or {}).items():
        if isinstance(inner, Mapping):
            _require_plain_basis(f"{where} modules_quant_config {name}", inner)


def _numbers(block: Mapping[str, Any]) -> Iterator[str]:
    """Every kind of number that some layer may have."""
    yield str(block.get("weights_dtype"))
    yield from (block.get("modules_dtype_dict") or {})
    for inner in (block.get("modules_quant_config") or {}).values():
        if isinstance(inner, Mapping):
            yield from _numbers(inner)


def _layer(codes: Tensor, header: Header, numbers: frozenset[str], where: str) -> StoredLayer:
    name = codes.name.removesuffix(".weight")
    for ending in SECOND:
        if f"{name}.{ending}" in header.tensors:
            raise FormatError(f"'{name}.{ending}' quantizes a scale again, which is not read")
    scale = header.tensors.get(f"{name}.scale")
    if scale is None:
        raise FormatError(f"{codes.name!r} is {codes.dtype} and has no scale '{name}.scale'")
    zero = f"{name}.zero_point" in header.tensors
    if codes.dtype == "U8":
        shape_NK, encoding, layout = _run(codes, scale, zero, numbers, where)
    else:
        shape_NK, encoding, layout = _whole(codes, scale)
        if zero:
            raise FormatError(f"'{name}.zero_point' is beside {codes.dtype}, which has none")
    grouped = codes.dtype == "U8" or len(codes.shape) == 3
    parts = [
        StoredPart(Role.CODES, codes.name, layout),
        StoredPart(Role.BLOCK_SCALE if grouped else Role.CHANNEL_SCALE, scale.name),
        *([StoredPart(Role.ZERO_POINT, f"{name}.zero_point")] if zero else []),
    ]
    branch = tuple(_branch(name, shape_NK, header))
    return StoredLayer(
        name=name,
        stored_NK=shape_NK,
        encoding=encoding,
        parts=(*parts, *branch),
        lowrank_input="raw" if branch else None,
        why=f"{where}: {codes.dtype} {'with' if zero else 'without'} zero points",
    )


Stored = tuple[tuple[int, int], Encoding, Layout]


def _whole(codes: Tensor, scale: Tensor) -> Stored:
    """A code per byte: rows, rows of groups, or columns."""
    encoding = WHOLE[codes.dtype]
    if len(codes.shape) == 3 and tuple(scale.shape) == (*codes.shape[:2], 1):
        n, groups, width = codes.shape
        blocked = Encoding(encoding.name, (*encoding.options, ("block", f"1x{width}")))
        return (n, groups * width), blocked, ROW_MAJOR
    if len(codes.shape) == 2 and tuple(scale.shape) == (codes.shape[0], 1):
        return (codes.shape[0], codes.shape[1]), encoding, ROW_MAJOR
    if len(codes.shape) == 2 and tuple(scale.shape) == (1, codes.shape[1]):
        return (codes.shape[1], codes.shape[0]), encoding, TRANSPOSED
    raise FormatError(
        f"{codes.name!r} has shape {list(codes.shape)} and its scale {list(scale.shape)}, which is "
        "read for linear layers only"
    )


def _run(codes: Tensor, scale: Tensor, zero: bool, numbers: frozenset[str], where: str) -> Stored:
    """Four bits. Raises FormatError for other numbers that are stored in bytes."""
    if len(codes.shape) != 1 or len(scale.shape) not in (2, 3):
        raise FormatError(
            f"{codes.name!r} is U8 of {list(codes.shape)}: of unsigned and of packed numbers those of "
            "four bits are read"
        )
    kinds = {kind for kind in numbers & RUNS if kind.startswith("uint") == zero}
    if len(kinds) != 1 or not kinds <= PACKED.keys():
        listed = " and ".join(sorted(kinds)) or "none that is stored so"
        raise FormatError(
            f"{codes.name!r} is a run of bytes, for which {where} declares {listed}; one of "
            f"{' and '.join(PACKED)} is read"
        )
    n, groups = scale.shape[0], prod(scale.shape[1:])
    k = 2 * codes.shape[0] // n
    if n * k != 2 * codes.shape[0] or k % groups or k % 2:
        raise FormatError(
            f"{codes.name!r} holds {2 * codes.shape[0]} numbers, {list(scale.shape)} scales do not "
            "divide them"
        )
    width = k // groups
    options = PACKED[kinds.pop()]
    group = () if width == 128 else (("group", str(width)),)
    return (n, k), Encoding("int4", (*group, *options)), Layout("flat")


def _branch(name: str, shape_NK: tuple[int, int], header: Header) -> Iterator[StoredPart]:
    """The low rank beside the weight. Raises FormatError for half of one, or one of other sizes."""
    pair = [header.tensors.get(f"{name}.{ending}") for ending in ("svd_up", "svd_down")]
    up, down = pair
    if up is None and down is None:
        return
    n, k = shape_NK
    if up is None or down is None or len(up.shape) != 2 or len(down.shape) != 2:
        raise FormatError(f"{name!r} has one half of svd_up and svd_down")
    turned = up.shape[0] != n
    rank = up.shape[0] if turned else up.shape[1]
    wanted = ((rank, n), (k, rank)) if turned else ((n, rank), (rank, k))
    if (tuple(up.shape), tuple(down.shape)) != wanted:
        raise FormatError(
            f"{up.name!r} has shape {list(up.shape)}, {down.name!r} {list(down.shape)}: no branch of "
            f"a weight of {list(shape_NK)}"
        )
    layout = TRANSPOSED if turned else ROW_MAJOR
    yield StoredPart(Role.LOWRANK_UP, up.name, layout)
    yield StoredPart(Role.LOWRANK_DOWN, down.name, layout)


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("int8", "fp8", "int4"),
    proof="owner's library",
)
