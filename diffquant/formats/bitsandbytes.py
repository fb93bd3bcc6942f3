"""bitsandbytes: what diffusers and transformers save after loading with `load_in_4bit` or `load_in_8bit`.

4 bits, nf4 or fp4 (Q), in blocks of 64 along the flattened weight, the earlier number in the high nibble:

    X.weight                             U8 [N * K / 2, 1]   names of levels
    X.weight.quant_map                   F32 [16]            the levels
    X.weight.absmax                      F32 [N * K / 64]    multiplies; with double quantization
                                         U8 [N * K / 64]     names of values of the nested map
    X.weight.nested_quant_map            F32 [256]           values
    X.weight.nested_absmax               F32 [blocks / 256]  multiplies them, then nested_offset is added
    X.weight.quant_state.bitsandbytes__Q U8                  JSON: quant_type, blocksize, shape [N, K],
                                                             nested_blocksize, nested_offset

8 bits, LLM.int8:

    X.weight         I8 [N, K]
    X.SCB            F32 [N]     largest magnitude of the row: weight = code * SCB / 127
    X.weight_format  U8 ()       0: rows as they are, all that is still written

Blocks need not end with a row: where K is no multiple of 64, groups are as wide as divides both, and a
scale is repeated. Inputs are not quantized; the outlier columns of LLM.int8 are a matter of its kernel.
Proof is a state or SCB beside a weight, or `quant_method: bitsandbytes`.

Source: bitsandbytes 0.50, which wrote and decoded the cases it is tested with.
"""

from collections.abc import Iterator, Mapping
from math import gcd, prod
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._json import blocks, json_object
from diffquant.headers import Header, Tensor
from diffquant.plan import Encoding, Layout, Options, Role
from diffquant.sources import Checkpoint

METHOD = "bitsandbytes"
KINDS = ("nf4", "fp4")
STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in KINDS)
ROW_FORMAT = b"\0"
#: What double quantization keeps beside coded block scales.
NESTED = ("nested_absmax", "nested_quant_map")


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    for name in header.tensors:
        if name.endswith(STATES):
            return f"{name!r} is the state of a 4-bit weight"
    for name in _names(header, "I8"):
        if f"{name}.SCB" in header.tensors:
            return f"'{name}.SCB' is the row scale of an 8-bit weight"
    for where, block in blocks(checkpoint, header, "quantization_config"):
        if block.get("quant_method") == METHOD:
            return f"{where} says quant_method {METHOD}"
    return None


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    layers = (
        *(_four_bit(name, header) for name in _names(header, "U8")),
        *(_eight_bit(name, header) for name in _names(header, "I8")),
    )
    unused = {
        f"{layer.name}.weight_format": "0: rows as they are"
        for layer in layers
        if f"{layer.name}.weight_format" in header.tensors
    }
    used = {part.tensor for layer in layers for part in layer.parts}
    unused |= {
        name: "its facts are in the plan"
        for name in header.tensors
        if name.endswith(STATES) and name not in used
    }
    return Reading(layers=layers, unused=unused)


def _names(header: Header, dtype: str) -> Iterator[str]:
    for name, tensor in header.tensors.items():
        if name.endswith(".weight") and tensor.dtype == dtype:
            yield name.removesuffix(".weight")


# four bits ---------------------------------------------------------------------------------------


def _four_bit(name: str, header: Header) -> StoredLayer:
    codes = header.tensors[f"{name}.weight"]
    marker = next(
        (m for m in (codes.name + state for state in STATES) if m in header.tensors), None
    )
    if marker is None:
        raise FormatError(
            f"{codes.name!r} is U8 without its quant_state, which says what its bytes mean"
        )
    state = json_object(header.read_small(marker).decode("utf-8", "replace"), repr(marker))
    n, k = _shape(codes, state, marker)
    block = _whole(state, "blocksize", marker)
    group, kind = gcd(block, k), state.get("quant_type")
    if kind not in KINDS:
        raise FormatError(f"{marker!r} says quant_type {kind!r:.60}, one of {KINDS} was needed")
    return StoredLayer(
        name=name,
        stored_NK=(n, k),
        encoding=_encoding(kind, group),
        parts=(
            StoredPart(Role.CODES, codes.name, Layout("flat", (("nibbles", "high"),))),
            *_scales(codes.name, header, state, marker, block // group),
        ),
        why=f"{kind} in blocks of {block}",
    )


def _encoding(kind: str, group: int) -> Encoding:
    wider = () if group == 64 else (("block", str(group)),)
    return Encoding("nf4", (*wider, *(() if kind == "nf4" else (("kind", kind),))))


def _shape(codes: Tensor, state: Mapping[str, Any], marker: str) -> tuple[int, int]:
    """N and K. Raises FormatError where the stored bytes are not theirs, or lie in two rows."""
    shape = state.get("shape")
    if not (
        isinstance(shape, list) and len(shape) > 1 and all(type(size) is int for size in shape)
    ):
        raise FormatError(f"{marker!r} says the shape is {shape!r:.60}, [N, K] was needed")
    n, k = shape[0], prod(shape[1:])
    if k % 2:
        raise FormatError(f"{codes.name!r} has rows of {k} numbers, whose bytes lie in two of them")
    if 2 * prod(codes.shape) != n * k:
        raise FormatError(
            f"{codes.name!r} holds {2 * prod(codes.shape)} numbers, {marker!r} says {shape}"
        )
    return n, k


def _scales(
    weight: str, header: Header, state: Mapping[str, Any], marker: str, repeat: int
) -> Iterator[StoredPart]:
    """What is beside the codes; a scale that is not there is the planner's to miss."""
    if f"{weight}.quant_map" not in header.tensors:
        raise FormatError(f"{weight!r} has no quant_map, the levels its codes name")
    yield StoredPart(Role.CODEBOOK, f"{weight}.quant_map")
    absmax = header.tensors.get(f"{weight}.absmax")
    if absmax is None:
        return
    yield StoredPart(Role.BLOCK_SCALE, absmax.name, Layout("flat", _repeated(repeat)))
    if absmax.dtype != "U8":
        return
    for ending in NESTED:
        if f"{weight}.{ending}" not in header.tensors:
            raise FormatError(
                f"{absmax.name!r} is coded, and {f'{weight}.{ending}'!r} is not stored"
            )
    above = repeat * _whole(state, "nested_blocksize", marker)
    yield StoredPart(Role.NESTED_SCALE, f"{weight}.nested_absmax", Layout("flat", _repeated(above)))
    yield StoredPart(Role.NESTED_MAP, f"{weight}.nested_quant_map")
    if not isinstance(state.get("nested_offset"), int | float):
        raise FormatError(f"{marker!r} has no nested_offset, which coded scales need")
    yield StoredPart(Role.NESTED_OFFSET, marker, Layout("json", (("key", "nested_offset"),)))


def _repeated(times: int) -> Options:
    return () if times == 1 else (("repeat", str(times)),)


def _whole(state: Mapping[str, Any], key: str, marker: str) -> int:
    found = state.get(key)
    if type(found) is not int or found < 1:
        raise FormatError(f"{marker!r} says {key} is {found!r:.60}, a whole number was needed")
    return found


# eight bits --------------------------------------------------------------------------------------


def _eight_bit(name: str, header: Header) -> StoredLayer:
    codes = header.tensors[f"{name}.weight"]
    order = f"{name}.weight_format"
    if order in header.tensors and header.read_small(order).strip(ROW_FORMAT):
        raise FormatError(
            f"{order!r} says the codes are tiled for a kernel of old, rows are what is read",
            hint="a current bitsandbytes loads it and saves it again in rows",
        )
    if len(codes.shape) != 2:
        raise FormatError(f"{codes.name!r} is I8 of {list(codes.shape)}, [N, K] was needed")
    parts = [StoredPart(Role.CODES, codes.name)]
    if f"{name}.SCB" in header.tensors:
        parts.append(StoredPart(Role.CHANNEL_SCALE, f"{name}.SCB"))
    return StoredLayer(
        name=name,
        stored_NK=(codes.shape[0], codes.shape[1]),
        encoding=Encoding("int8_amax"),
        parts=tuple(parts),
        why="8 bits by the largest magnitude of each row",
    )


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("nf4", "int8_amax"),
    proof="owner's library",
)
