"""What a segment's header says of the pool's CUDA memory.

Written once by the creator before the pool has its name, but for the state, which is one word and
changes under the pool's lock. It knows the words, and nothing of CUDA.
"""

from __future__ import annotations

from typing import NamedTuple

from shmblocks._state.layout import DEVICE, H_DEVICE_STATE, WORD, WORD_STRUCT

# No CUDA memory (yet); exported; its creator has left the pool, so that nobody can open it any
# more. A creator that died leaves EXPORTED: that it is dead says the same.
NOTHING = 0
EXPORTED = 1
CREATOR_LEFT = 2


class Export(NamedTuple):
    """The device region of the header. `creator` is a participant word."""

    state: int
    creator: int
    uuid: bytes
    handle: bytes


def read_export(memory: memoryview) -> Export:
    """What the header says."""
    return Export._make(DEVICE.unpack_from(memory, H_DEVICE_STATE * WORD))


def write_export(memory: memoryview, export: Export) -> None:
    """Fill the region; the state last."""
    offset = H_DEVICE_STATE * WORD
    data = DEVICE.pack(*export)
    memory[offset + WORD : offset + DEVICE.size] = data[WORD:]
    memory[offset : offset + WORD] = data[:WORD]


def note_creator_left(memory: memoryview, who: int) -> None:
    """The participant leaves: if it made the memory, say that nobody else can open it now."""
    export = read_export(memory)
    if export.state == EXPORTED and export.creator == who:
        offset = H_DEVICE_STATE * WORD
        memory[offset : offset + WORD] = WORD_STRUCT.pack(CREATOR_LEFT)
