"""Headers: names, dtypes, shapes, byte ranges and metadata of stored tensors; never weights.

One module per container, picked by the first bytes of the file. Reading a header costs one small
read per file, whatever the file weighs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """A kind of weights file: whether first bytes are its own, and how its header is read.

    read   (path, index of the file) -> its tensors, carrying that index, and its metadata;
           raises HeaderError for anything that is not whole
    """

    recognizes: Callable[[bytes], bool]
    read: Callable[[Path, int], tuple[Sequence[Tensor], Mapping[str, str]]]


CONTAINERS: Registry[Container] = Registry("diffquant.headers", "CONTAINER")

#: Metadata in which shards of one set may differ; the first file's value is kept.
PER_FILE_METADATA = frozenset({"format", "split.no", "tensor_names"})

#: How many first bytes it takes to recognize a container or a stranger.
_FIRST_BYTES = 64


@dataclass(frozen=True, slots=True)
class _Stranger:
    """A kind of file people hand over by mistake: its first bytes, what it is, what to do."""

    starts: tuple[bytes, ...]
    what: str
    hint: str


_NO_PICKLES = "pickles can run code; save the weights again as safetensors and pass that file"
_STRANGERS = (
    _Stranger(
        (b"version https://git-lfs.github.com/spec",),
        "is a Git LFS pointer, not the weights it points to",
        "run `git lfs pull` in its directory",
    ),
    _Stranger(
        (b"<!doctype", b"<!DOCTYPE", b"<html", b"<HTML"),
        "is a web page, not weights",
        "download it again from a `resolve` URL, or with `hf download`",
    ),
    _Stranger((b"PK\x03\x04",), "is a zip archive or a PyTorch pickle", _NO_PICKLES),
    _Stranger(
        tuple(bytes((0x80, protocol)) for protocol in range(2, 6)), "is a pickle", _NO_PICKLES
    ),
    _Stranger(
        (b"{",),
        "is JSON, not weights",
        "pass the safetensors file, or the directory that holds it",
    ),
)


def read(files: Sequence[Path]) -> Header:
    """The headers of `files`, the shards of one set of weights, as one table.

    Raises HeaderError when a file is missing, is no container or is not whole, when two files
    store one name, or when their metadata contradict each other.
    """
    containers = CONTAINERS.load_all().values()
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    told_by: dict[str, Path] = {}
    for index, path in enumerate(files):
        stored, told = _container(path, containers).read(path, index)
        for tensor in stored:
            if (other := tensors.setdefault(tensor.name, tensor)) is not tensor:
                raise HeaderError(
                    f"{tensor.name!r} is stored twice, in '{files[other.file]}' and in '{path}'",
                    hint="are these the shards of one model? name one file",
                )
        for key, value in told.items():
            if key not in PER_FILE_METADATA and metadata.get(key, value) != value:
                raise HeaderError(
                    f"metadata {key!r} of '{path}' contradicts that of '{told_by[key]}'",
                    hint="are these the shards of one model? name one file",
                )
            metadata.setdefault(key, value)
            told_by.setdefault(key, path)
    return Header(tuple(files), tensors, metadata)


def _container(path: Path, containers: Iterable[Container]) -> Container:
    first = _first_bytes(path)
    for container in containers:
        if container.recognizes(first):
            return container
    for stranger in _STRANGERS:
        if first.lstrip().startswith(stranger.starts):
            raise HeaderError(f"'{path}' {stranger.what}", hint=stranger.hint)
    raise HeaderError(
        f"'{path}' is no weights file that can be read, it starts with {first[:8]!r}",
        hint=f"these can: {', '.join(CONTAINERS.names())}",
    )


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            first = stream.read(_FIRST_BYTES)
    except FileNotFoundError:
        raise HeaderError(
            f"no file '{path}'", hint="is a shard missing, or a link broken? download it again"
        ) from None
    except OSError as error:
        raise HeaderError(f"'{path}' cannot be opened: {error.strerror}") from error
    if not first:
        raise HeaderError(f"'{path}' is empty", hint="download it again")
    return first
