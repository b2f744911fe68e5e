"""SGLang's `EmbeddingStore` over the content cache: encoders of a node share what they encoded.

For `--enable-mm-global-cache`. The choices of `--mm-global-cache-backend` are closed, so that this
takes the name of the only one, "mooncake"; with STORE on, Mooncake's own cannot be used.

An entry is the bytes of one item's embedding, under a key made of SGLang's hash, the model and the
pool's epoch. It stays until an allocation needs its blocks.
"""

from __future__ import annotations

import ctypes
import pkgutil
import struct
from collections.abc import Sequence

from shmblocks._state.layout import UNBOUNDED
from shmblocks.cache import FIELD, ROW_BYTES
from shmblocks.errors import KeyExistsError
from shmblocks.keys import Namespace
from shmblocks.pool import BlockPool
from shmblocks.sglang_plugin.attachment import Attachment
from shmblocks.sglang_plugin.process import logger, process
from shmblocks.sglang_plugin.settings import read_settings

NAME = "mooncake"
CLASS = "EmbeddingStoreInPool"
_BASE = "sglang.srt.mem_cache.embedding_store.EmbeddingStore"
_FACTORY = "sglang.srt.mem_cache.embedding_store.EmbeddingStoreFactory"
# In an entry's `aux`: a mark, and how many bytes it has.
_LENGTH = struct.Struct("<8sQ")
_MARK = b"sglangE1"


class PoolStore:
    """The methods of SGLang's `EmbeddingStore`. `ptrs` are addresses, `sizes` bytes; one result
    each: whether it was found, or is there now. Nothing raises."""

    def __init__(self, storage_config: object = None) -> None:
        settings = read_settings()
        if settings is None:
            raise RuntimeError("SHMBLOCKS_SGLANG_POOL: expected the name of a pool, it is not set")
        self._attachment = Attachment(settings, "sglang store")
        self._namespace = Namespace(model=_model(), config="sglang mm global cache")

    def register_buffer(self, tensor: object) -> None:
        """Any memory can be copied from; there is nothing to register."""

    def get_key(self, mm_hash: str) -> str:
        """As SGLang's own."""
        return f"emb_{mm_hash}"

    def batch_is_exist(self, hashes: Sequence[str]) -> list[bool]:
        """Which of them have an entry; a hint, as it is with every store."""
        pool = self._attachment.pool()
        if pool is None:
            return [False] * len(hashes)
        found = [pool.find(self._key(pool, each)) for each in hashes]
        return [each is not None and each.is_ready for each in found]

    def batch_get(
        self, hashes: Sequence[str], ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[bool]:
        """Copy entries to one buffer each."""
        return self.batch_get_into_multi_buffers(
            hashes, [[ptr] for ptr in ptrs], [[size] for size in sizes]
        )

    def batch_put(
        self, hashes: Sequence[str], ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[bool]:
        """Enter what is in one buffer each."""
        return self.batch_put_from_multi_buffers(
            hashes, [[ptr] for ptr in ptrs], [[size] for size in sizes]
        )

    def batch_get_into_multi_buffers(
        self, hashes: Sequence[str], ptrs: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]
    ) -> list[bool]:
        """Copy entries to several buffers each; one of another length is not found."""
        results = [False] * len(hashes)
        pool = self._attachment.pool()
        for index, mm_hash in enumerate(hashes if pool is not None else ()):
            with process.guarded(f"the entry of {mm_hash} is not used"):
                results[index] = self._get(pool, mm_hash, ptrs[index], sizes[index])
        return results

    def batch_put_from_multi_buffers(
        self, hashes: Sequence[str], ptrs: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]
    ) -> list[bool]:
        """Enter what is in several buffers each; False: no blocks are free or can be made free."""
        results = [False] * len(hashes)
        pool = self._attachment.pool()
        for index, mm_hash in enumerate(hashes if pool is not None else ()):
            with process.guarded(f"{mm_hash} is not entered"):
                results[index] = self._put(pool, mm_hash, ptrs[index], sizes[index])
        return results

    def _key(self, pool: BlockPool, mm_hash: str) -> bytes:
        return self._namespace.key(mm_hash, epoch=pool.epoch)

    def _get(
        self, pool: BlockPool | None, mm_hash: str, ptrs: Sequence[int], sizes: Sequence[int]
    ) -> bool:
        leases = pool.get(self._key(pool, mm_hash)) if pool is not None else None
        if not leases:
            return False
        with leases[0] as lease:
            if _LENGTH.unpack_from(lease.memory("aux")) != (_MARK, sum(sizes)):
                return False
            source = lease[FIELD].data_ptr()
            for ptr, size in zip(ptrs, sizes, strict=True):
                ctypes.memmove(ptr, source, size)
                source += size
        return True

    def _put(
        self, pool: BlockPool | None, mm_hash: str, ptrs: Sequence[int], sizes: Sequence[int]
    ) -> bool:
        rows = -(-sum(sizes) // ROW_BYTES)
        if pool is None or not 0 < pool.config.blocks_for(rows) <= pool.config.total_blocks:
            return False
        if pool.find(self._key(pool, mm_hash)) is not None:
            return True
        reservation = pool.reserve_now(rows, req_id=f"store {mm_hash}")
        if reservation is None:
            return False
        with reservation:
            target = reservation[FIELD].data_ptr()
            for ptr, size in zip(ptrs, sizes, strict=True):
                ctypes.memmove(target, ptr, size)
                target += size
            _LENGTH.pack_into(reservation.memory("aux"), 0, _MARK, sum(sizes))
            try:
                reservation.publish(readers=UNBOUNDED, key=self._key(pool, mm_hash))
            except KeyExistsError:
                logger.debug("shmblocks: %s was entered by another encoder", mm_hash)
        return True


def _model() -> str:
    """Which model's embeddings they are: its path and revision, as SGLang was started with."""
    model = pkgutil.resolve_name("sglang.srt.runtime_context.get_model")()
    return f"{model.model_path} {getattr(model, 'revision', None) or ''}"


def __getattr__(name: str) -> type:
    """SGLang imports the class by this module's name; it must be a subclass of SGLang's own."""
    if name != CLASS:
        raise AttributeError(name)
    base = pkgutil.resolve_name(_BASE)
    made: type = type(base)(CLASS, (PoolStore, base), {"__module__": __name__})
    globals()[CLASS] = made
    return made


def register() -> None:
    """Take the name of the only backend that SGLang's arguments allow, and say so."""
    pkgutil.resolve_name(_FACTORY).register_backend(NAME, __name__, CLASS)
    logger.warning(
        "shmblocks: the embedding store %r is the pool of shmblocks in this process, and not "
        "Mooncake (SHMBLOCKS_SGLANG_STORE=1)",
        NAME,
    )
