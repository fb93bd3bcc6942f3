"""safetensors: eight bytes of length, a JSON header, then the tensors without a gap.

offset      bytes   content
0           8       h, the header's length, unsigned little endian
8           h       JSON: name -> {"dtype", "shape", "data_offsets": [start, stop]};
                    "__metadata__" -> {string: string}
8 + h       rest    data; offsets count from here, and the ranges cover it exactly

Shapes are row-major and logical: two F4 values share a byte, yet count as two.
Source: the format section of the README of huggingface/safetensors.
"""

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from diffquant.errors import HeaderError
from diffquant.headers import Container, Tensor

#: Bits per element. The NUZ variants are AMD's, without negative zero.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: The reference implementation refuses longer headers too.
LONGEST_HEADER = 100_000_000

_AGAIN = "download it again"


def read(path: Path, file: int) -> tuple[Sequence[Tensor], Mapping[str, str]]:
    """Tensors in order of their offsets, and the metadata. Raises HeaderError."""
    with path.open("rb") as stream:
        text, size = _header_bytes(stream, path)
    entries = _parsed(text, path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    data = 8 + len(text)
    tensors = [_tensor(name, entry, file, data, path) for name, entry in entries.items()]
    tensors.sort(key=attrgetter("start", "stop"))
    _require_exact_cover(tensors, data, size, path)
    return tensors, metadata


def _header_bytes(stream: BinaryIO, path: Path) -> tuple[bytes, int]:
    size = stream.seek(0, 2)
    stream.seek(0)
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > LONGEST_HEADER:
        raise HeaderError(
            f"'{path}' announces a header of {length} bytes, the most is {LONGEST_HEADER}",
            hint="is it a safetensors file?",
        )
    if 8 + length > size:
        raise HeaderError(
            f"'{path}' is truncated: its header alone needs {8 + length} bytes, it has {size}",
            hint=_AGAIN,
        )
    return stream.read(length), size


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise HeaderError(f"the header of '{path}' has the key {twice!r} twice")
        return table

    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise HeaderError(
            f"the header of '{path}' is not valid JSON: {error}", hint=_AGAIN
        ) from error
    if not isinstance(entries, dict):
        raise HeaderError(f"the header of '{path}' is no JSON object")
    return entries


def _metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise HeaderError(f"'__metadata__' of '{path}' is no JSON object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise HeaderError(
                f"metadata {key!r} of '{path}' is a {type(value).__name__}, safetensors has strings"
            )
    return metadata


def _tensor(name: str, entry: Any, file: int, data: int, path: Path) -> Tensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise HeaderError(
            f"{name!r} of '{path}' lacks one of dtype, shape and two data_offsets"
        ) from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise HeaderError(
            f"{name!r} of '{path}' has the unknown dtype {dtype!r}",
            hint=f"known are: {', '.join(BITS)}",
        )
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise HeaderError(f"{name!r} of '{path}' has the shape {shape!r}, no list of sizes")
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
        raise HeaderError(f"{name!r} of '{path}' has the byte range [{start!r}, {stop!r}]")
    if (stop - start) * 8 != prod(shape) * BITS[dtype]:
        raise HeaderError(
            f"{name!r} of '{path}' spans {stop - start} bytes, "
            f"{dtype} {shape} needs {prod(shape) * BITS[dtype] / 8:g}"
        )
    return Tensor(name, dtype, tuple(shape), file, data + start, data + stop)


def _require_exact_cover(tensors: Sequence[Tensor], data: int, size: int, path: Path) -> None:
    """Ranges must follow each other from the first byte of data to the last of the file."""
    covered, before = data, "the header"
    for tensor in tensors:
        if tensor.start != covered:
            fault = "overlaps" if tensor.start < covered else "leaves a gap after"
            raise HeaderError(f"{tensor.name!r} of '{path}' {fault} {before}")
        covered, before = tensor.stop, repr(tensor.name)
    if covered > size:
        raise HeaderError(
            f"'{path}' is truncated: {before} ends at byte {covered}, the file at {size}",
            hint=_AGAIN,
        )
    if covered < size:
        raise HeaderError(f"'{path}' has {size - covered} bytes after {before} that no tensor owns")


def _recognizes(first: bytes) -> bool:
    """No magic number: a JSON object must begin at byte 8."""
    return first[8:9] == b"{"


CONTAINER = Container(recognizes=_recognizes, read=read)
