"""Pixels in the pool: SGLang's segment for each tensor (`ShmPointerMMData`) becomes blocks.

SGLang's own segments (`/dev/shm/sgl_shm_mm_*`) stay for ever when it is killed while pixels travel
(sglang #40723). The rule is SGLang's, and POSIX's:

- whoever unpickles one has it mapped: a lease;
- the first to materialize unlinks it: `free`, so that the blocks drain;
- the others keep what they have mapped: their leases;
- materialized memory is the process's own, copy-on-write: `Lease.private`.

How many will unpickle is unknown (the data parallel controller does, too), so that many readers are
announced; what nobody opens comes back after `unclaimed_timeout`. Without free blocks, or without
the pool, SGLang's own segment is used as before.
"""

from __future__ import annotations

import logging
import pkgutil
from typing import TYPE_CHECKING

from shmblocks.cache import FIELD, ROW_BYTES
from shmblocks.errors import ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease
from shmblocks.pool import BlockPool
from shmblocks.sglang_plugin.attachment import Attachment
from shmblocks.sglang_plugin.process import process
from shmblocks.sglang_plugin.settings import LOCK_TIMEOUT, Settings
from shmblocks.view import rows_as_tensor

if TYPE_CHECKING:
    import torch

    class _Segment:
        """What is used of SGLang's class."""

        shm_name: str
        shape: torch.Size
        dtype: torch.dtype
        precomputed_hash: int | None
        tensor: torch.Tensor | None
        _shm_handle: object
        _materialization_error: str | None

        def __init__(self, tensor: torch.Tensor, precomputed_hash: int | None = None) -> None: ...

        def __getstate__(self) -> dict[str, object]: ...

        def __setstate__(self, state: dict[str, object]) -> None: ...

        def materialize(self) -> torch.Tensor: ...

        def close_and_unlink(self) -> None: ...

        def __del__(self) -> None: ...
else:
    _Segment = object

logger = logging.getLogger("shmblocks.sglang")

TARGET = "sglang.srt.managers.mm_utils.ShmPointerMMData"
# More than will ever unpickle one copy, fewer than `UNBOUNDED`, which has no deadline.
MANY_READERS = 1 << 20
_HANDLE = "shmblocks"


class PixelsInPool(_Segment):
    """SGLang's class with blocks instead of a segment, where there are some."""

    attachment: Attachment
    _handle: BlockHandle | None = None
    _lease: Lease | None = None

    def __init__(self, tensor: torch.Tensor, precomputed_hash: int | None = None) -> None:
        self._handle = None
        with process.guarded("pixels go through a segment of SGLang's"):
            self._handle = self._put(tensor)
        if self._handle is None:
            super().__init__(tensor, precomputed_hash)
            return
        self.shm_name = ""
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.precomputed_hash = precomputed_hash
        self._shm_handle = self.tensor = self._materialization_error = None

    def _put(self, tensor: torch.Tensor) -> BlockHandle | None:
        pool = self.attachment.pool()
        rows = -(-tensor.nbytes // ROW_BYTES)
        if pool is None or not rows or pool.config.blocks_for(rows) > pool.config.total_blocks:
            return None
        with pool.lock_timeout(LOCK_TIMEOUT):
            reservation = pool.reserve_now(rows, req_id="pixels")
        if reservation is None:
            return None
        with reservation:
            reservation.tensor(tensor.dtype, tensor.shape).copy_(tensor)
            return reservation.publish(readers=MANY_READERS)

    def __getstate__(self) -> dict[str, object]:
        state = super().__getstate__()
        if self._handle is not None:
            state[_HANDLE] = self._handle.encode()
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        data = state.get(_HANDLE)
        if not isinstance(data, bytes):
            super().__setstate__(state)
            return
        vars(self).update({name: state.get(name) for name in _ATTRIBUTES})
        self._shm_handle = self.tensor = self._materialization_error = None
        try:
            # It never raises: all ranks must come to the end of the broadcast.
            self._handle = BlockHandle.decode(data)
            self._lease = self._pool().open(self._handle)
            self.tensor = self._lease.tensor(self.dtype, self.shape)
        except Exception as error:
            logger.exception("shmblocks: pixels")
            self._materialization_error = f"{type(error).__name__}: {error}"

    def _pool(self) -> BlockPool:
        pool = self.attachment.pool()
        if pool is None:
            raise RuntimeError("shmblocks: this process is not attached to the pool of the pixels")
        return pool

    def materialize(self) -> torch.Tensor:
        """Memory of this process, which it may write to; the blocks are free with the last one."""
        if self._handle is None:
            return super().materialize()
        try:
            lease = self._lease
            if lease is None:
                raise RuntimeError(self._materialization_error or "materialized before")
            self.tensor = None
            return rows_as_tensor(lease.private(FIELD), self.dtype, self.shape)
        finally:
            self.close_and_unlink()

    def close_and_unlink(self) -> None:
        """End this process's lease, and let nobody else come."""
        handle, lease = self._handle, self._lease
        if handle is None:
            super().close_and_unlink()
            return
        self._lease = self.tensor = None
        with process.guarded("pixels come back later"):
            try:
                self._pool().free(handle)
            except ShmBlocksError as error:
                logger.debug("shmblocks: another rank was first: %s", error)
            if lease is not None:
                lease.release()

    def __del__(self) -> None:
        lease = vars(self).pop("_lease", None)
        if lease is not None:
            self.tensor = None
            lease.release()
        # A half-made one has none.
        if "_shm_handle" in vars(self):
            super().__del__()


_ATTRIBUTES = ("shm_name", "shape", "dtype", "precomputed_hash")


def make_class(settings: Settings) -> type:
    """The class that replaces SGLang's; pickle and SGLang's msgpack know it by the same name."""
    original = pkgutil.resolve_name(TARGET)
    module, _, name = TARGET.rpartition(".")
    members = {
        "__module__": module,
        "__qualname__": name,
        "attachment": Attachment(settings, "sglang pixels"),
    }
    return type(name, (PixelsInPool, original), members)
