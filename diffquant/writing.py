"""Streaming writer of safetensors: declared first, made tensor by tensor, whole or not at all.

All names, dtypes and shapes are known before the first byte, so each shard's header is written
once and data follows without a second pass; the peak in memory is one tensor. Everything is made
in `<output>.partial`, next to the place it is meant for, and renamed when it is whole:

    <output>.partial/manifest.json     digest of what is being written; finished shards and sizes;
                                       how much of the unfinished one is surely on the disk
    <output>.partial/*.safetensors     finished shards, and at most one that is being written

A run that was killed is resumed: what the manifest of the same digest names is kept, the rest is
redone. An error removes everything; an interrupt does not. The same declaration always gives the
same bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from diffquant.errors import ConvertError
from diffquant.headers.safetensors import BITS
from diffquant.tensors import DTYPES

GIB = 1 << 30
CONFIG = "config.json"

#: Bytes of an unfinished shard after which it is written through to the disk and noted.
MARK = 256 << 20

#: Files that are weights, or speak of how weights are split; everything else is copied.
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

#: Called after every tensor with bytes done, bytes in all, and the tensor's name.
Progress = Callable[[int, int, str], None]

#: Called with the finished files before they get their names; what it raises removes them.
Check = Callable[[Sequence[Path]], None]


@dataclass(frozen=True, slots=True)
class Declared:
    """A tensor to write: `dtype` as safetensors spells it, `make` called once when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The shape of the tensor `make` gives: torch holds F4 as bytes of two codes."""
        if self.dtype == "F4":
            return (*self.shape[:-1], self.shape[-1] // 2)
        return self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What lies there now: shards in order, bytes of tensor data, shards a former run had finished."""

    shards: tuple[Path, ...]
    total_size: int
    resumed: int


def write(
    output: Path,
    tensors: Sequence[Declared],
    *,
    origin: str = "",
    beside: Path | None = None,
    config: Mapping[str, Any] | None = None,
    without: frozenset[str] = frozenset(),
    metadata: Mapping[str, str] | None = None,
    stem: str = "diffusion_pytorch_model",
    max_shard_size: int = 10 * GIB,
    overwrite: bool = False,
    check: Check | None = None,
    on_progress: Progress | None = None,
) -> Written:
    """Write a component directory: one file, or shards with an index, and what lies beside them.

    origin     names what the data is made from; only a killed run of the same origin is resumed
    beside     a directory whose files, weights excepted, are copied
    config     entries laid over its config.json
    without    entries of it that are left out
    metadata   strings for every shard's header, beside `format: pt`
    check      called with the finished shards while everything is still temporary

    Raises ConvertError when the output exists and is not to be overwritten, when the disk is too
    small, and when a made tensor is not what was declared.
    """
    output = Path(os.path.abspath(output))
    shards = _shards(tensors, stem, max_shard_size, {"format": "pt", **(metadata or {})})
    partial = _Partial(output.with_name(f"{output.name}.partial"), _digest(shards, origin))
    _put_back(output)
    require_absent(output, overwrite)
    partial.open()
    with partial:
        resumed = _make(partial, shards, beside, on_progress)
        _write_index(partial.path / f"{stem}.safetensors.index.json", shards)
        _copy_beside(partial.path, beside, config, without)
        if check is not None:
            check([partial.path / shard.file for shard in shards])
        partial.become(output)
    return Written(
        shards=tuple(output / shard.file for shard in shards),
        total_size=sum(shard.data for shard in shards),
        resumed=resumed,
    )


def write_file(
    path: Path,
    tensors: Sequence[Declared],
    *,
    origin: str = "",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    check: Check | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Write one file and nothing beside it, whole or not at all. Raises as `write` does."""
    path = Path(os.path.abspath(path))
    require_absent(path, overwrite)
    (shard,) = _shards(tensors, path.stem, 1 << 63, metadata or {})
    partial = _Partial(path.with_name(f"{path.name}.partial"), _digest([shard], origin))
    partial.open()
    with partial:
        _make(partial, [shard], None, on_progress)
        if check is not None:
            check([partial.path / shard.file])
        partial.give(shard, path)
    return path


def _make(
    partial: "_Partial",
    shards: Sequence["_Shard"],
    beside: Path | None,
    on_progress: Progress | None,
) -> int:
    """Every shard that is not there yet; how many a former run had finished."""
    finished = [shard for shard in shards if partial.holds(shard)]
    _require_space(partial.path, shards, finished, beside)
    done = sum(shard.data for shard in finished)
    total = sum(shard.data for shard in shards)
    for shard in shards:
        if shard in finished:
            continue
        for name, size in _stream(partial, shard):
            done += size
            if on_progress is not None:
                on_progress(done, total, name)
        partial.finished(shard)
    return len(finished)


# shards --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file to be: its tensors in stored order, and the bytes of its header."""

    file: str
    tensors: tuple[Declared, ...]
    header: bytes

    @property
    def data(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def size(self) -> int:
        return len(self.header) + self.data

    def size_of(self, count: int) -> int:
        """Bytes of the file up to its tensor `count`; nothing of it before the first one."""
        data = sum(tensor.nbytes for tensor in self.tensors[:count])
        return len(self.header) + data if count else 0


def _shards(
    tensors: Sequence[Declared], stem: str, limit: int, metadata: Mapping[str, str]
) -> list[_Shard]:
    names = [tensor.name for tensor in tensors]
    if not names or len(set(names)) != len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        raise ConvertError(f"{twice!r} is declared twice" if twice else "there is nothing to write")
    parts = list(_split(tensors, limit))
    numbers = [f"-{n:05}-of-{len(parts):05}" for n in range(1, len(parts) + 1)]
    tails = numbers if len(parts) > 1 else [""]
    ordered = [tuple(sorted(part, key=_alignment)) for part in parts]
    return [
        _Shard(f"{stem}{tail}.safetensors", part, _header(part, metadata))
        for tail, part in zip(tails, ordered, strict=True)
    ]


def _split(tensors: Sequence[Declared], limit: int) -> Iterator[list[Declared]]:
    """Runs of tensors of at most `limit` bytes; those of one module stay together."""
    part: list[Declared] = []
    size = 0
    for _, module in groupby(tensors, key=lambda tensor: tensor.name.rpartition(".")[0]):
        together = list(module)
        added = sum(tensor.nbytes for tensor in together)
        if part and size + added > limit:
            yield part
            part, size = [], 0
        part += together
        size += added
    yield part


def _alignment(tensor: Declared) -> tuple[int, int]:
    """Sort key: declared order as far as every tensor still starts at a multiple of its element."""
    if BITS[tensor.dtype] == 64:
        return (0, 0)
    return (1, 0) if tensor.nbytes % 4 == 0 else (2, -BITS[tensor.dtype])


def _header(tensors: Sequence[Declared], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for tensor in tensors:
        span = [start, start + tensor.nbytes]
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        start = span[1]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-len(text) % 8)  # so that data starts aligned
    return len(padded).to_bytes(8, "little") + padded


def _digest(shards: Sequence[_Shard], origin: str) -> str:
    sha = hashlib.sha256(origin.encode())
    for shard in shards:
        sha.update(shard.file.encode() + b"\0" + shard.header)
    return sha.hexdigest()


def _stream(partial: "_Partial", shard: _Shard) -> Iterator[tuple[str, int]]:
    """Write the shard through to disk, and say after each tensor which and how many bytes."""
    there = partial.marked(shard)
    with (partial.path / shard.file).open("r+b" if there else "wb") as stream:
        stream.truncate(shard.size_of(there))
        stream.seek(0, os.SEEK_END)
        if not there:
            stream.write(shard.header)
        noted = stream.tell()
        for number, tensor in enumerate(shard.tensors, 1):
            if number > there:
                _write_one(stream, tensor)
            yield tensor.name, tensor.nbytes
            if stream.tell() - noted > MARK:
                _through(stream)
                partial.mark(shard, number)
                noted = stream.tell()
        _through(stream)


def _through(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _write_one(stream: BinaryIO, declared: Declared) -> None:
    made = declared.make().detach()
    if made.dtype != DTYPES[declared.dtype] or tuple(made.shape) != declared.held_shape:
        raise ConvertError(
            f"{declared.name!r} was declared {declared.dtype} {list(declared.shape)} and became "
            f"{made.dtype} {list(made.shape)}"
        )
    flat = made.cpu().contiguous().reshape(-1)
    stream.write(flat.view(DTYPES["U8"]).numpy().data)


# the directory ---------------------------------------------------------------------------------------


class _Partial:
    """The directory being made, and its manifest of finished shards."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self._digest = digest
        self._sizes: dict[str, int] = {}
        self._mark: tuple[str, int] | None = None

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"

    def open(self) -> None:
        """Take over what a killed run of the same digest finished; start afresh otherwise."""
        if self._manifest.exists():
            found = json.loads(self._manifest.read_text("utf-8"))
            if found["digest"] == self._digest:
                self._sizes = found["shards"]
                self._mark = found["mark"] and (found["mark"][0], found["mark"][1])
        if not self._sizes and self._mark is None:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def holds(self, shard: _Shard) -> bool:
        path = self.path / shard.file
        listed = self._sizes.get(shard.file) == shard.size
        return listed and path.exists() and path.stat().st_size == shard.size

    def marked(self, shard: _Shard) -> int:
        """How many tensors of an unfinished shard are surely there."""
        path, count = self.path / shard.file, 0
        if self._mark is not None and self._mark[0] == shard.file and path.exists():
            count = self._mark[1]
        return count if count and path.stat().st_size >= shard.size_of(count) else 0

    def mark(self, shard: _Shard, count: int) -> None:
        """Note that the first `count` tensors of a shard are on the disk."""
        self._mark = (shard.file, count)
        self._note()

    def finished(self, shard: _Shard) -> None:
        self._sizes[shard.file] = shard.size
        self._mark = None
        self._note()

    def _note(self) -> None:
        found = {"digest": self._digest, "shards": self._sizes, "mark": self._mark}
        _write_text(self._manifest, json.dumps(found, indent=1))

    def become(self, output: Path) -> None:
        """Take the output's name. A former output survives under `.old` until that is done."""
        self._manifest.unlink(missing_ok=True)
        _sync(self.path)
        old = _old(output)
        if output.exists():
            output.rename(old)
        self.path.rename(output)
        _sync(output.parent)
        shutil.rmtree(old, ignore_errors=True)

    def give(self, shard: _Shard, path: Path) -> None:
        """Put the only shard in its place, beside which nothing stays."""
        (self.path / shard.file).replace(path)
        _sync(path.parent)
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> "_Partial":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        known = {*self._sizes, *([] if self._mark is None else [self._mark[0]])}
        if issubclass(kind, Exception) or not known:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for path in self.path.iterdir():
            if path != self._manifest and path.name not in known:
                path.unlink()


def _old(output: Path) -> Path:
    return output.with_name(f"{output.name}.old")


def _put_back(output: Path) -> None:
    """Finish what a run killed between its two renames left: the former output comes back."""
    old = _old(output)
    if old.exists() and not output.exists():
        old.rename(output)


def require_absent(output: Path, overwrite: bool) -> None:
    """Raises ConvertError when the output is in the way."""
    if output.exists() and not overwrite:
        raise ConvertError(f"{str(output)!r} exists", hint="--overwrite replaces it")


def require_space(partial: Path, needed: int) -> None:
    """Raises ConvertError when the disk of a folder, to be made beside its place, is too small."""
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise ConvertError(
            f"{needed / 1e6:,.1f} MB are to be written and {free / 1e6:,.1f} MB are free at "
            f"{str(partial.parent)!r}",
            hint="choose an output on another disk",
        )


def _require_space(
    partial: Path, shards: Sequence[_Shard], finished: Sequence[_Shard], beside: Path | None
) -> None:
    copied = sum(path.stat().st_size for path in _others(beside))
    require_space(partial, copied + sum(shard.size for shard in shards if shard not in finished))


def _write_index(path: Path, shards: Sequence[_Shard]) -> None:
    if len(shards) == 1:
        return
    where = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    index = {
        "metadata": {"total_size": sum(shard.data for shard in shards)},
        "weight_map": dict(sorted(where.items())),
    }
    _write_text(path, json.dumps(index, indent=2) + "\n")


def _copy_beside(
    partial: Path,
    beside: Path | None,
    config: Mapping[str, Any] | None,
    without: frozenset[str],
) -> None:
    """The config comes last and in one step: without it a folder is no component."""
    copied = {path.name: path for path in _others(beside)}
    own = copied.pop(CONFIG, None)
    for name, path in copied.items():
        shutil.copyfile(path, partial / name)
    found = {} if own is None else json.loads(own.read_text("utf-8"))
    kept = {key: value for key, value in found.items() if key not in without}
    if own is not None or config is not None:
        _write_text(partial / CONFIG, json.dumps({**kept, **(config or {})}, indent=2) + "\n")


def _others(beside: Path | None) -> list[Path]:
    """Files beside the weights; directories and hidden files are nobody's business."""
    found = [] if beside is None else sorted(beside.iterdir())
    plain = (path for path in found if path.is_file() and not path.name.startswith("."))
    return [path for path in plain if not path.name.endswith(WEIGHTS)]


def _write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the former text or this one."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)


def _sync(directory: Path) -> None:
    """Make renames in a directory survive a power cut, where directories can be opened."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
