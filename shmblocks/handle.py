"""`BlockHandle`: the value that crosses a queue instead of the tensor.

It names consecutive blocks of one pool and carries what proves that it is not stale. It owns
nothing: copying or losing it changes no state. Decoding trusts no byte; whether the blocks are
(still) what the handle says is asked of the pool, under its lock, when the handle is used.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from shmblocks.errors import MalformedHandleError

UInt32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
UInt64 = Annotated[int, msgspec.Meta(ge=0)]

MAX_ENCODED_BYTES = 40


class BlockHandle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Blocks `start_block .. start_block + num_blocks - 1`, holding `num_tokens` tokens.

    `generation` is the allocation's own number, never given twice in a pool (0: a fake handle of a
    warm-up request, which names no blocks); `pool_id` is the pool's random number.
    """

    start_block: UInt32
    num_blocks: UInt32
    num_tokens: UInt64
    generation: UInt64 = 0
    pool_id: UInt64 = 0

    @property
    def is_fake(self) -> bool:
        """Whether it came from `fake=True` and names no blocks."""
        return self.generation == 0

    def encode(self) -> bytes:
        """At most 40 bytes of MessagePack."""
        return _encoder.encode(self)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> BlockHandle:
        """The handle that `encode` made; `MalformedHandleError` for any other bytes."""
        if len(data) > MAX_ENCODED_BYTES:
            raise MalformedHandleError(
                f"expected an encoded handle of at most {MAX_ENCODED_BYTES} bytes, "
                f"got {len(data)} bytes"
            )
        try:
            return _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedHandleError(
                f"expected the bytes of BlockHandle.encode(), got {bytes(data)!r}: {error}"
            ) from error


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(BlockHandle)
