"""Memory that the network's next window uses again, on a CPU.

glibc gives every large tensor pages of its own and gives them back when it is freed; the kernel then fills each page
with zeros once more for the next window. Of a ViT-S with a pyramid decoder on 512 px that is a seventh of the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["pages_kept"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt
_NEVER, _DEFAULT_TRIM, _DEFAULT_MMAPS = -1, 128 << 10, 65536


@contextmanager
def pages_kept() -> Iterator[None]:
    """Freed memory stays with this process meanwhile; at the end it is given back. Without glibc nothing happens."""
    library = None
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        if library is not None:
            library.mallopt(_MMAP_MAX, _DEFAULT_MMAPS)
            library.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM)
            library.malloc_trim(0)
