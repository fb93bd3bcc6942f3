"""Weights in files, as pages: brought before they are read, given back when that is done.

Pages of a mapped file cost nothing to give back, since the file still holds them. What was written
into them goes as well, so nothing is ever written into a mapped weight. Linux only; elsewhere
nothing counts as mapped and giving back does nothing.
"""

import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

PAGE = mmap.PAGESIZE
#: Linux's numbers: read pages in now (a kernel before 5.14 refuses, and faults bring them later);
#: give pages back.
POPULATE_READ, DONTNEED = 22, 4
#: Stays on a disk where /tmp is memory; TMPDIR overrules it.
SPILL_FOLDER = Path("/var/tmp")

#: Bytes of a spill that are mapped at once.
EXTENT = 1 << 28

Span = tuple[int, int]
#: What becomes of a tensor that is to stay: itself, or the same values elsewhere.
Keep = Callable[[Tensor], Tensor]


class Pages:
    """What of some tensors lies in mapped files."""

    def __init__(self, tensors: Sequence[Tensor], mapped: "Mapped | None" = None) -> None:
        # Held, so that the memory at these addresses stays what it is.
        self._held = [tensor.data for tensor in tensors]
        mapped = mapped or Mapped()
        self.spans = _merged(_pages_of(tensor) for tensor in self._held if mapped.holds(tensor))

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def bring(self) -> None:
        """Read them in now. May run in a thread: others go on meanwhile."""
        self._advise(POPULATE_READ)

    def arrive(self) -> None:
        """They lie where they are used."""

    def release(self) -> None:
        """Give them back; the next read brings them again."""
        self._advise(DONTNEED)

    def _advise(self, advice: int) -> None:
        if (madvise := _madvise()) is not None:
            for start, stop in self.spans:
                madvise(start, stop - start, advice)


class Mapped:
    """The addresses of this process that are those of files, as they are now."""

    def __init__(self) -> None:
        spans = _merged(_file_spans())
        self._starts = [start for start, _ in spans]
        self._stops = [stop for _, stop in spans]

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is a file's."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return False
        address = tensor.data_ptr()
        place = bisect_right(self._starts, address) - 1
        return place >= 0 and address < self._stops[place]


class Spill:
    """A file without a name for tensors that no file holds: what quantizing, casting or undoing a
    layout made. It goes with the last tensor that lies in it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._descriptor, name = tempfile.mkstemp(prefix="diffquant-", dir=folder or spill_folder())
        os.unlink(name)
        weakref.finalize(self, os.close, self._descriptor)
        self._mapped = Mapped()
        self._extent: mmap.mmap | None = None
        self._start = self._taken = 0

    @property
    def size(self) -> int:
        """Bytes written, in whole pages."""
        return self._start + self._taken

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values and strides, in a file; what is smaller than a page stays in memory."""
        if tensor.device.type != "cpu" or tensor.nbytes < PAGE or self._is_mapped(tensor):
            return tensor
        held = self._stored(spanned(tensor))
        return held.as_strided(tensor.shape, tensor.stride())

    def _is_mapped(self, tensor: Tensor) -> bool:
        # Memory that torch allocated can be resized, a map cannot; this saves asking the system.
        if tensor.untyped_storage().resizable():
            return False
        if not self._mapped.holds(tensor):
            self._mapped = Mapped()
        return self._mapped.holds(tensor)

    def _stored(self, flat: Tensor) -> Tensor:
        extent, offset = self._room(flat.nbytes)
        _write(self._descriptor, flat.view(torch.uint8).numpy().data, self._start + offset)
        held = torch.frombuffer(extent, dtype=torch.uint8, count=flat.nbytes, offset=offset)
        return held.view(flat.dtype)

    def _room(self, count: int) -> tuple[mmap.mmap, int]:
        """A map with so many bytes to take, and where in it. Maps are few, since each one holds a
        file descriptor."""
        if self._extent is None or self._taken + count > len(self._extent):
            self._start, self._taken = self.size, 0
            length = max(EXTENT, -(-count // PAGE) * PAGE)
            os.ftruncate(self._descriptor, self._start + length)
            self._extent = mmap.mmap(
                self._descriptor, length, access=mmap.ACCESS_COPY, offset=self._start
            )
        offset = self._taken
        self._taken += -(-count // PAGE) * PAGE
        return self._extent, offset


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def rehome(module: nn.Module, keep: Keep) -> None:
    """Every tensor of the module moved to where `keep` puts it; what refers to one still does."""
    for tensor in tensors_of(module):
        tensor.data = keep(tensor.data)


def spanned(tensor: Tensor) -> Tensor:
    """All memory between the first and the last value of a tensor, flat; whatever its strides."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * step for size, step in steps) if tensor.numel() else 0
    return tensor.as_strided((extent,), (1,))


def spill_folder() -> Path:
    """Where a spill goes: TMPDIR, else a folder that is on a disk wherever there is one."""
    if "TMPDIR" in os.environ or not SPILL_FOLDER.is_dir():
        return Path(tempfile.gettempdir())
    return SPILL_FOLDER


def _write(descriptor: int, content: memoryview, start: int) -> None:
    """All of it: one call writes 2 GB at most."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], start + done)


def _pages_of(tensor: Tensor) -> Span:
    """First and last address, rounded outward: a page shared with a neighbour comes back by itself."""
    start = tensor.data_ptr()
    stop = start + spanned(tensor).nbytes
    return start // PAGE * PAGE, -(-stop // PAGE) * PAGE


def _file_spans() -> Iterator[Span]:
    """Lines of /proc/self/maps that name a file: `start-stop rights offset device inode path`."""
    if sys.platform != "linux":
        return
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            addresses, _, _, _, inode = line.split(None, 5)[:5]
            if inode != "0":
                start, stop = addresses.split("-")
                yield int(start, 16), int(stop, 16)


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """madvise(address, bytes, advice), without Python's lock; None where advice means other things."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    called: Callable[[int, int, int], int] = found
    return called
