"""Small and large damage to bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Bytes that have a meaning in MessagePack, or at the edges of numbers.
_TELLING = bytes((0x00, 0x01, 0x7F, 0x80, 0x81, 0x90, 0x95, 0x9F, 0xA0, 0xC0, 0xC4, 0xCA, 0xCB,
                  0xCC, 0xCD, 0xCE, 0xCF, 0xD3, 0xD9, 0xDC, 0xDD, 0xDE, 0xE0, 0xFF))  # fmt: skip


def mutated(data: bytes, chooser: random.Random, others: list[bytes]) -> bytes:
    """`data` after one to four changes, parts of `others` among them."""
    result = bytearray(data)
    for _ in range(chooser.choice((1, 1, 1, 2, 4))):
        _change(result, chooser, others)
    return bytes(result)


def _change(data: bytearray, chooser: random.Random, others: list[bytes]) -> None:
    kind = chooser.randrange(8)
    at = chooser.randrange(len(data) + 1)
    if kind == 0:
        data[at:at] = bytes((chooser.choice(_TELLING),))
    elif kind == 1:
        del data[at : at + chooser.randrange(1, 9)]
    elif kind == 2:
        data[at:at] = chooser.randbytes(chooser.randrange(1, 9))
    elif kind == 3:
        other = chooser.choice(others)
        start = chooser.randrange(len(other) + 1)
        data[at:at] = other[start : start + chooser.randrange(1, 20)]
    elif kind == 4:
        data[:] = chooser.randbytes(chooser.randrange(0, 60))
    elif data:
        at = min(at, len(data) - 1)
        flip = 1 << chooser.randrange(8)
        data[at] = data[at] ^ flip if kind < 7 else chooser.choice(_TELLING)


def words_mutated(data: bytearray, chooser: random.Random, indices: Sequence[int]) -> None:
    """Change one to five of the aligned 8-byte words of these indices, in place."""
    for _ in range(chooser.choice((1, 1, 1, 2, 3, 5))):
        at = chooser.choice(indices) * 8
        old = int.from_bytes(data[at : at + 8], "little")
        data[at : at + 8] = plausible_word(old, chooser).to_bytes(8, "little")


def plausible_word(old: int, chooser: random.Random) -> int:
    """A number that code may believe, or that lies at an edge of what it can hold."""
    new = chooser.choice(
        (
            0, 1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 1 << 16, (1 << 16) + 1, 1 << 31, 1 << 32,
            (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 2, old + 1, old - 1, old << 16,
            old ^ (1 << chooser.randrange(64)), chooser.getrandbits(64),
        )
    )  # fmt: skip
    return new % (1 << 64)
