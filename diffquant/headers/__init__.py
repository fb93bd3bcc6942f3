"""Headers: names, dtypes, shapes, byte ranges and metadata of stored tensors; never weights.

One module per container, picked by the first bytes of the file. Reading a header costs one small
read per file, whatever the file weighs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffquant.errors import HeaderError
from diffquant.plugins import Registry

SMALL = 64 * 1024


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor. `dtype` is spelled as safetensors does (F8_E4M3, BF16, U8 …; GGUF blocks
    as ggml types, `GGML_Q4_K`); `start` and `stop` are absolute byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one or more files as one table.

    files      in the order given; `Tensor.file` indexes them
    metadata   the files' string metadata, merged; contradictions between shards are an error
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def read_small(self, name: str) -> bytes:
        """The bytes of a marker tensor or scalar. Raises HeaderError above 64 KiB."""
        tensor = self.tensors[name]
        if tensor.nbytes > SMALL:
            raise HeaderError(f"{name!r} has {tensor.nbytes} bytes, a marker has at most {SMALL}")
        with self.files[tensor.file].open("rb") as stream:
            stream.seek(tensor.start)
            return stream.read(tensor.nbytes)


@dataclass(frozen=True, slots=True)
class Container:
    """A kind of weights file: whether first bytes are its own, and how its header is read."""

    recognizes: Callable[[bytes], bool]
    read: Callable[[Path], tuple[Sequence[Tensor], Mapping[str, str]]]


CONTAINERS: Registry[Container] = Registry("diffquant.headers", "CONTAINER")
