"""GGUF versions 2 and 3: magic, key-values, tensor infos, then data in aligned pieces.

content                                          encoding (little endian)
"GGUF", version                                  4 bytes, u32
number of tensors, number of key-values          u64, u64
key-values: key, type, value                     string, u32, scalar | string | array
tensor infos: name, rank, sizes, type, offset    string, u32, u64 × rank, u32, u64
padding to `general.alignment` (default 32), then data; offsets count from here

A string is a u64 length and UTF-8; an array is a u32 type, a u64 count and the items. Sizes are
stored fastest axis first and are reversed here, so that a weight reads [N, K]. Blocks lie along K.
Key-values that are scalars or strings become metadata, in their JSON spelling and as they are.
`comfy.gguf.orig_shape.<tensor>` gives back the shape of a tensor that was stored reshaped.
Source: docs/gguf.md of ggml-org/ggml; block sizes as in ggml-common.h.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from diffquant.errors import HeaderError
from diffquant.headers import Container, Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
ALIGNMENT = "general.alignment"

#: ggml type -> dtype, values per block, bytes per block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("GGML_Q4_0", 32, 18),
    3: ("GGML_Q4_1", 32, 20),
    6: ("GGML_Q5_0", 32, 22),
    7: ("GGML_Q5_1", 32, 24),
    8: ("GGML_Q8_0", 32, 34),
    9: ("GGML_Q8_1", 32, 40),  # as the gguf package counts; never meant for files
    10: ("GGML_Q2_K", 256, 84),
    11: ("GGML_Q3_K", 256, 110),
    12: ("GGML_Q4_K", 256, 144),
    13: ("GGML_Q5_K", 256, 176),
    14: ("GGML_Q6_K", 256, 210),
    15: ("GGML_Q8_K", 256, 292),
    16: ("GGML_IQ2_XXS", 256, 66),
    17: ("GGML_IQ2_XS", 256, 74),
    18: ("GGML_IQ3_XXS", 256, 98),
    19: ("GGML_IQ1_S", 256, 50),
    20: ("GGML_IQ4_NL", 32, 18),
    21: ("GGML_IQ3_S", 256, 110),
    22: ("GGML_IQ2_S", 256, 82),
    23: ("GGML_IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("GGML_IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("GGML_TQ1_0", 256, 54),
    35: ("GGML_TQ2_0", 256, 66),
    39: ("GGML_MXFP4", 32, 17),
    40: ("GGML_NVFP4", 64, 36),
    41: ("GGML_Q1_0", 128, 18),
}

#: Type of a key's value -> its struct letter.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
#: ggml itself has four. ComfyUI-GGUF adds the convolutions of video models with their five.
MOST_AXES = 5

_AGAIN = "download it again"


@dataclass(slots=True)
class _Cursor:
    """Reads a file in order and never past its end."""

    stream: BinaryIO
    path: Path
    size: int
    at: int = 0

    def take(self, count: int) -> bytes:
        self._claim(count)
        return self.stream.read(count)

    def skip(self, count: int) -> None:
        self._claim(count)
        self.stream.seek(count, os.SEEK_CUR)

    def one(self, letter: str) -> Any:
        return self.many(letter, 1)[0]

    def many(self, letter: str, count: int) -> tuple[Any, ...]:
        width = struct.calcsize(letter)
        return struct.unpack(f"<{count}{letter}", self.take(count * width))

    def string(self) -> str:
        text = self.take(self.one("Q"))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise HeaderError(
                f"'{self.path}' has a name that is no UTF-8 before byte {self.at}", hint=_AGAIN
            ) from None

    def _claim(self, count: int) -> None:
        self.at += count
        if self.at > self.size:
            raise HeaderError(
                f"'{self.path}' is truncated: its header reaches beyond byte {self.size}, "
                "the end of the file",
                hint=_AGAIN,
            )


def read(path: Path, file: int) -> tuple[Sequence[Tensor], Mapping[str, str]]:
    """Tensors in order of their offsets, and scalar key-values. Raises HeaderError."""
    with path.open("rb") as stream:
        cursor = _Cursor(stream, path, os.fstat(stream.fileno()).st_size)
        tensor_count, pair_count = _counts(cursor)
        pairs = _pairs(cursor, pair_count)
        tensors = [_tensor(cursor, file) for _ in range(tensor_count)]
    alignment = _alignment(pairs, path)
    data = -(-cursor.at // alignment) * alignment
    placed = [
        replace(
            tensor,
            shape=_shape(tensor, pairs.get(ORIGINAL_SHAPE + tensor.name), path),
            start=tensor.start + data,
            stop=tensor.stop + data,
        )
        for tensor in tensors
    ]
    placed.sort(key=attrgetter("start", "stop"))
    _require_order(placed, alignment, data, cursor)
    _require_unique(placed, path)
    return placed, {key: _spelled(value) for key, value in pairs.items() if _is_plain(value)}


def _counts(cursor: _Cursor) -> tuple[int, int]:
    cursor.skip(len(MAGIC))
    version = cursor.one("I")
    if version & 0xFFFF == 0:
        raise HeaderError(
            f"'{cursor.path}' is a big-endian GGUF file, little endian is needed",
            hint="convert it with llama.cpp's gguf_convert_endian.py",
        )
    if version not in VERSIONS:
        raise HeaderError(
            f"'{cursor.path}' is GGUF version {version}, versions 2 and 3 can be read"
        )
    tensor_count, pair_count = cursor.many("Q", 2)
    return tensor_count, pair_count


def _pairs(cursor: _Cursor, count: int) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in pairs:
            raise HeaderError(f"the header of '{cursor.path}' has the key {key!r} twice")
        pairs[key] = _value(cursor, key)
    return pairs


def _value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.one("I")
    if kind == STRING:
        return cursor.string()
    if kind == ARRAY:
        return _array(cursor, key)
    return cursor.one(_letter(cursor, kind, key))


def _array(cursor: _Cursor, key: str) -> tuple[Any, ...] | None:
    """The items of an original shape; other arrays (tokenizers' mostly) are passed over: None."""
    kind, count = cursor.one("I"), cursor.one("Q")
    if kind == STRING:
        for _ in range(count):
            cursor.skip(cursor.one("Q"))
        return None
    letter = _letter(cursor, kind, key)
    if key.startswith(ORIGINAL_SHAPE):
        return cursor.many(letter, count)
    cursor.skip(count * struct.calcsize(letter))
    return None


def _letter(cursor: _Cursor, kind: int, key: str) -> str:
    if kind not in SCALARS:
        raise HeaderError(f"key {key!r} of '{cursor.path}' has a value of unknown type {kind}")
    return SCALARS[kind]


def _tensor(cursor: _Cursor, file: int) -> Tensor:
    """A tensor as its info states it; its offsets still count from the start of the data."""
    name, rank = cursor.string(), cursor.one("I")
    if rank > MOST_AXES:
        raise HeaderError(
            f"{name!r} of '{cursor.path}' has {rank} axes, GGUF has at most {MOST_AXES}"
        )
    shape = cursor.many("Q", rank)[::-1]
    kind, start = cursor.one("I"), cursor.one("Q")
    if kind not in TYPES:
        raise HeaderError(
            f"{name!r} of '{cursor.path}' has the unknown ggml type {kind}",
            hint="the file may be newer than this program, or an old type that ggml dropped",
        )
    dtype, values, width = TYPES[kind]
    if shape and shape[-1] % values:
        raise HeaderError(
            f"{name!r} of '{cursor.path}' has rows of {shape[-1]} values, "
            f"{dtype} stores blocks of {values}"
        )
    return Tensor(name, dtype, shape, file, start, start + prod(shape) // values * width)


def _alignment(pairs: Mapping[str, Any], path: Path) -> int:
    alignment = pairs.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise HeaderError(f"{ALIGNMENT!r} of '{path}' is {alignment!r}, no power of two")
    return alignment


def _shape(tensor: Tensor, original: Any, path: Path) -> tuple[int, ...]:
    if original is None:
        return tensor.shape
    sizes = isinstance(original, tuple) and all(type(n) is int and n >= 0 for n in original)
    if not sizes or prod(original) != prod(tensor.shape):
        raise HeaderError(
            f"{tensor.name!r} of '{path}' is stored as {list(tensor.shape)}, "
            f"its original shape {original!r} does not hold as many values"
        )
    return tuple(original)


def _require_order(tensors: Sequence[Tensor], alignment: int, data: int, cursor: _Cursor) -> None:
    """Each range begins where the one before ends, but for less than `alignment` of padding."""
    first = Tensor("the header", "", (), 0, 0, data)
    for before, tensor in pairwise((first, *tensors)):
        if tensor.start < before.stop:
            raise HeaderError(f"{tensor.name!r} of '{cursor.path}' overlaps {before.name!r}")
        if tensor.start - before.stop >= alignment:
            raise HeaderError(
                f"{tensor.name!r} of '{cursor.path}' leaves a gap after {before.name!r}"
            )
        if tensor.stop > cursor.size:
            raise HeaderError(
                f"'{cursor.path}' is truncated: {tensor.name!r} ends at byte {tensor.stop}, "
                f"the file at {cursor.size}",
                hint=_AGAIN,
            )


def _require_unique(tensors: Sequence[Tensor], path: Path) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise HeaderError(f"the header of '{path}' has the tensor {tensor.name!r} twice")
        seen.add(tensor.name)


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, tuple)


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _recognizes(first: bytes) -> bool:
    return first.startswith(MAGIC)


CONTAINER = Container(recognizes=_recognizes, read=read)
