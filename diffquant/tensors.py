"""Stored bytes as torch tensors, mapped from disk and never copied.

A tensor returned here is a view of a private, copy-on-write map of its file: reading it touches
only its own pages, and nothing written to it can reach the file.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffquant import headers
from diffquant.errors import HeaderError

#: safetensors dtype -> torch dtype. Scales in E8M0 are handled as their exponent bytes, packed FP4
#: as bytes that hold two codes.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,
    "F4": torch.uint8,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


#: Bytes that `Passing` hands out before it gives pages back.
RESIDENT = 128 << 20


class Weights:
    """The tensors of a plan's files, by file index and stored name."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._headers = [headers.read([Path(file)]) for file in files]
        self._maps: dict[int, mmap.mmap] = {}

    def header(self, file: int) -> headers.Header:
        return self._headers[file]

    def tensor(self, file: int, name: str) -> Tensor:
        """The stored tensor, in its stored shape. Raises HeaderError for a dtype torch lacks."""
        stored = self._headers[file].tensors[name]
        if stored.dtype.startswith("GGML_"):
            return self._bytes(file, stored)
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise HeaderError(f"{name!r} is stored as {stored.dtype}, which torch cannot hold")
        shape = _packed(stored.shape) if stored.dtype == "F4" else stored.shape
        return self._bytes(file, stored).view(dtype).reshape(shape)

    def _bytes(self, file: int, stored: headers.Tensor) -> Tensor:
        if not stored.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        mapped = self._map(file)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=stored.nbytes, offset=stored.start)

    def _map(self, file: int) -> mmap.mmap:
        if file not in self._maps:
            with self._headers[file].files[0].open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


class Passing(Weights):
    """Weights that are read through: pages of what was handed out earlier are given back, so that
    a file of any size takes no more than about `RESIDENT` bytes of memory and one tensor.

    What is still in use is read from the file again, so nothing may be written to it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self._handed_out = 0

    def _bytes(self, file: int, stored: headers.Tensor) -> Tensor:
        if self._handed_out > RESIDENT:
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
            self._handed_out = 0
        self._handed_out += stored.nbytes
        return super()._bytes(file, stored)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2)
