"""What the C library keeps of freed memory, given back to the system."""

import ctypes
import sys
from functools import cache

#: Bytes of freed memory below which asking the system for them again costs more than keeping them.
WORTH_GIVING_BACK = 64 * 10**6


class _Info(ctypes.Structure):
    """glibc's mallinfo2, in bytes over all arenas; `fordblks` is what was freed and kept."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def give_back(above: int = 0) -> None:
    """Let the system have what was freed, where that is more than `above` bytes: glibc keeps blocks
    below 32 MB between those that live on, and a model of such layers would come to hold three times
    what it needs. Does nothing where the C library is another."""
    library = _glibc()
    if library is not None and library.mallinfo2().fordblks >= above:
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not (hasattr(library, "malloc_trim") and hasattr(library, "mallinfo2")):
        return None
    assert library is not None
    library.mallinfo2.restype = _Info
    return library
