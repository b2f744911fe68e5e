"""The bytes of a message, and the proof that all of them arrived.

Both sides know the seed and the number of a message, so the reader can tell every byte that it
must find without being told by the writer. A payload is one random chunk, repeated, each time
XORed with a 16-bit mask made of the message's number and the chunk's position:

- both bytes of the mask change from message to message, so in two messages less than 256 apart
  *every byte* differs: what is left of the last message cannot pass for this one;
- and from chunk to chunk, so a chunk at the wrong position shows too.

Values are compared as int16: among random bf16 there are NaNs, which equal nothing.
It does not measure anything; filling and checking stand outside every timed region.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Smaller: more calls for a payload. Larger: the chunk no longer stays in a processor's cache.
CHUNK_TOKENS = 128


class PayloadMismatchError(Exception):
    """A message arrived with other bytes than were sent."""


class Pattern:
    """Fills and checks payloads; the same in every process that was given the same seed."""

    def __init__(self, hidden: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._chunk = torch.randint(
            -(2**15), 2**15, (CHUNK_TOKENS, hidden), generator=generator, dtype=torch.int16
        )
        self._expected = torch.empty_like(self._chunk)

    def fill(self, payload: Tensor, number: int) -> None:
        """Write message `number` into `payload`, bf16 [tokens, hidden]."""
        for position, rows in enumerate(_chunks(payload)):
            torch.bitwise_xor(self._chunk[: len(rows)], _mask(number, position), out=rows)

    def check(self, payload: Tensor, number: int, tokens: int) -> None:
        """Compare every byte. Raises `PayloadMismatchError` with the first token that is wrong."""
        expected = (tokens, self._chunk.shape[1])
        if tuple(payload.shape) != expected or payload.dtype != torch.bfloat16:
            raise PayloadMismatchError(
                f"message {number}: expected bfloat16 {expected}, "
                f"got {payload.dtype} {tuple(payload.shape)}"
            )
        for position, rows in enumerate(_chunks(payload)):
            self._check_chunk(rows, number, position)

    def _check_chunk(self, rows: Tensor, number: int, position: int) -> None:
        expected = self._expected[: len(rows)]
        torch.bitwise_xor(self._chunk[: len(rows)], _mask(number, position), out=expected)
        if torch.equal(rows, expected):
            return
        wrong = (rows != expected).any(dim=1).nonzero()[0, 0]
        raise PayloadMismatchError(
            f"message {number}: token {position * CHUNK_TOKENS + int(wrong)} arrived with other "
            "bytes than were sent"
        )


def _chunks(payload: Tensor) -> Iterator[Tensor]:
    """Views of the payload's bits, int16 [at most CHUNK_TOKENS, hidden]."""
    bits = payload.view(torch.int16)
    for start in range(0, len(bits), CHUNK_TOKENS):
        yield bits[start : start + CHUNK_TOKENS]


def _mask(number: int, position: int) -> int:
    """A signed 16-bit value; odd factors, so that each byte takes all 256 values in turn."""
    low = (number + 7 * position) & 0xFF
    high = (3 * number + 5 * position) & 0xFF
    mask = high << 8 | low
    return mask - 2**16 if mask >= 2**15 else mask
