"""What a process would leave behind if it were killed now, as one digest.

Contract
- It covers every byte of the memory that the process shares (its MAP_SHARED mappings), and the
  names in /dev/shm that contain a given text, each with its inode, size and number of links.
- Everything else that a pool's process has ends with it: its own memory, descriptors, file locks.
- What it looks at may change while it looks, by somebody else: two equal digests of a process that
  is alone with its scene say that a death at either moment leaves the same; two different ones say
  nothing.

What it does not do: see sockets, pipes, files elsewhere, or the memory of a GPU.
"""

from __future__ import annotations

import hashlib
import os

from shmblocks._os.segment import SHM_DIRECTORY

_CHUNK = 1 << 20


def lasting_state(names: str) -> bytes:
    """A digest of the shared memory, and of the names in /dev/shm that contain `names`."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in _entries(names):
        digest.update(entry)
    # Unbuffered: a buffer would read pages behind the mapping that was asked for.
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            addresses, permissions, offset, device, inode, *_ = line.split()
            if permissions.endswith("s"):
                digest.update(f"{permissions} {offset} {device} {inode}".encode())
                start, end = (int(address, 16) for address in addresses.split("-"))
                _add_memory(digest, memory.fileno(), start, end)
    return digest.digest()


def _entries(names: str) -> list[bytes]:
    found = []
    with os.scandir(SHM_DIRECTORY) as entries:
        for entry in entries:
            if names in entry.name:
                status = entry.stat(follow_symlinks=False)
                about = (entry.name, status.st_ino, status.st_size, status.st_nlink)
                found.append(repr(about).encode())
    return sorted(found)


def _add_memory(digest: hashlib.blake2b, memory: int, start: int, end: int) -> None:
    while start < end:
        try:
            data = os.pread(memory, min(_CHUNK, end - start), start)
        except OSError:  # beyond the end of its file, or not to be read
            return
        if not data:
            return
        digest.update(data)
        start += len(data)
