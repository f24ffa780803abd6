"""Memory that a process has freed and the C library holds back."""

import ctypes
import sys

# M_MMAP_THRESHOLD of glibc's malloc.h, and the size from which on blocks are mapped, and unmapped when freed.
_THRESHOLD, _BYTES = -3, 1 << 20


def give_back_freed_memory() -> None:
    """Have large blocks given back to the system as soon as they are freed, for the whole process; glibc alone.

    By itself glibc soon keeps blocks of up to 32 MB: an answer to a long recording was seen to take 1.6 times what its
    tensors need.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(_THRESHOLD, _BYTES)
