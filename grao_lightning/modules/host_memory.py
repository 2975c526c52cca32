"""The memory of this process that its allocator holds and nobody uses."""

import ctypes
import sys
from functools import lru_cache
from typing import Any


def give_back_memory() -> None:
    """Hand free pages of the heap back to the system where more of it is free than in use (glibc).

    Between sampling and update, and between micro-batches, hundreds of megabytes of freed tensors
    lie scattered in the heap, which what comes next cannot always use. Without them the peak is
    lower; but to ask the system for them again takes time, about a tenth of an update.
    """
    library = _glibc()
    if library is None:
        return
    heap = library.mallinfo2()
    if heap.fordblks > heap.uordblks + heap.hblkhd:
        library.malloc_trim(0)


class _Heap(ctypes.Structure):
    """What ``mallinfo2`` tells, in bytes but for the counts."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@lru_cache(maxsize=1)
def _glibc() -> Any:
    """Return the C library if it is glibc 2.33 or later."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2") or not hasattr(library, "malloc_trim"):
        return None
    library.mallinfo2.restype = _Heap
    return library
