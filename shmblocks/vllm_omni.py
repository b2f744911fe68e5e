"""vLLM-omni: payloads between the stages of a pipeline, through one pool.

    connectors:
      my_edge: {name: ShmBlocksConnector, extra: {pool: omni, pool_bytes: 1073741824}}

vLLM-omni's own connector makes a segment and a lock file for each payload; what a killed process
has not read stays in /dev/shm. Here a payload is an entry of a byte pool with one announced reader:
it is freed when it was read, when it is cleaned up, when nobody came for it in five minutes, and
with the pool. It is found by its key, as there; a key may be any text.

Contract
- It is a subclass of vLLM-omni's `SharedMemoryConnector`, which it asks for at an abort.
- `put` waits for room up to `put_seconds`, then says that it failed, as for any other failure.
- `get` never waits: None means that the payload is not there yet.

What it does not do: keep tensors on a GPU; vLLM-omni serializes a payload on the CPU. Importing
this needs vllm_omni; importing `shmblocks` does not.
"""

from __future__ import annotations

import logging
import struct
from typing import Any

from vllm_omni.distributed.omni_connectors.connectors.shm_connector import SharedMemoryConnector

from shmblocks.cache import FIELD, ROW_BYTES, byte_config
from shmblocks.errors import KeyExistsError, ShmBlocksError
from shmblocks.keys import content_key
from shmblocks.pool import BlockPool

NAME = "ShmBlocksConnector"
# Keys that `reap_consumed` looks at in one call. More: the call takes longer (6 us each).
REAPED_AT_ONCE = 64

_SIZE = struct.Struct("<Q")
_log = logging.getLogger("vllm.omni.shmblocks")


class ShmBlocksConnector(SharedMemoryConnector):
    """Stores payloads in a pool of the node.

    config["pool"]         its name ("vllm-omni")
    config["pool_bytes"]   its size in bytes, the same in every stage (1 GiB)
    config["put_seconds"]  how long `put` waits for room (10)

    Other keys are vLLM-omni's.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        # Before anything that may fail: `__del__` closes.
        self._pool: BlockPool | None = None
        self._put_seconds = float(config.get("put_seconds", 10.0))
        size = int(config.get("pool_bytes", 1 << 30))
        name = str(config.get("pool", "vllm-omni"))
        role = f"omni stage {self.stage_id}"
        self._pool = BlockPool.ensure(name, byte_config(size), role=role, prefault="off")

    def _open(self) -> BlockPool:
        if self._pool is None:
            raise ShmBlocksError(f"{NAME}: it is closed; make another one")
        return self._pool

    def put(
        self,
        from_stage: str,
        to_stage: str,
        put_key: str,
        data: Any,  # noqa: ANN401
    ) -> tuple[bool, int, dict[str, Any] | None]:
        """Store a payload for one reader: whether it is stored, its size in bytes, metadata."""
        try:
            self.reap_consumed()
            payload = self.serialize_obj(data)
            self._store(_key(put_key), payload)
        except (ShmBlocksError, TypeError, ValueError) as error:
            _log.error("put of %s failed: %s", put_key, error)
            return False, 0, None
        with self._pending_keys_lock:
            self._pending_keys[put_key] = None
            self._metrics["puts"] += 1
            self._metrics["bytes_transferred"] += len(payload)
        handle = {"name": put_key, "size": len(payload)}
        return True, len(payload), {"shm": handle, "size": len(payload)}

    def _store(self, key: bytes, payload: bytes) -> None:
        pool = self._open()
        rows = max(1, -(-len(payload) // ROW_BYTES))
        with pool.reserve(rows, timeout=self._put_seconds) as reservation:
            reservation.memory(FIELD)[: len(payload)] = payload
            reservation.memory("aux")[: _SIZE.size] = _SIZE.pack(len(payload))
            try:
                reservation.publish(readers=1, key=key)
                return
            except KeyExistsError:
                pool.drop(key)  # of an earlier request of that name
        # Its blocks went with the refusal; nobody else puts this key.
        self._store(key, payload)

    def get(
        self,
        from_stage: str,
        to_stage: str,
        get_key: str,
        metadata: dict[str, Any] | None = None,
    ) -> tuple[Any, int] | None:
        """The payload of a key and its size in bytes; None: it is not there (yet).

        The key alone finds it; metadata is not needed.
        """
        try:
            leases = self._open().get(_key(get_key))
            if not leases:
                return None
            with leases[0] as lease:
                (size,) = _SIZE.unpack_from(lease.memory("aux"))
                payload = bytes(lease.memory(FIELD)[:size])
            found = self.deserialize_obj(payload)
        except (ShmBlocksError, TypeError, ValueError) as error:
            _log.error("get of %s failed: %s", get_key, error)
            return None
        with self._pending_keys_lock:
            self._pending_keys.pop(get_key, None)
            self._metrics["gets"] += 1
        return found, size

    def cleanup(self, request_id: str) -> None:
        """Free a payload that nobody has read; `request_id` is the exact key that was put."""
        with self._pending_keys_lock:
            self._pending_keys.pop(request_id, None)
        if self._pool is not None:
            try:
                self._pool.drop(_key(request_id))
            except ShmBlocksError as error:
                _log.error("cleanup of %s failed: %s", request_id, error)

    def reap_consumed(self) -> None:
        """Forget keys that were read in another process."""
        pool = self._open()
        with self._pending_keys_lock:
            for key in list(self._pending_keys)[:REAPED_AT_ONCE]:
                del self._pending_keys[key]
                if pool.find(_key(key)) is not None:
                    self._pending_keys[key] = None  # to the end of the queue

    def health(self) -> dict[str, Any]:
        """Its counts, and how full the pool is."""
        if self._pool is None:
            return {"status": "closed", **self._metrics}
        stats = self._pool.stats()
        return {
            "status": "healthy",
            **self._metrics,
            "free_blocks": stats.free_blocks,
            "total_blocks": self._pool.config.total_blocks,
        }

    def close(self) -> None:
        """Free what was put here and not read, and leave the pool. Idempotent."""
        pool = getattr(self, "_pool", None)
        if pool is None:
            return
        for key in list(self._pending_keys):
            self.cleanup(key)
        self._pool = None
        pool.close()


def _key(key: str) -> bytes:
    return content_key(b"vllm-omni", key)


def register() -> None:
    """The entry point `vllm_omni.general_plugins`; it may run more than once."""
    from vllm_omni.distributed.omni_connectors.factory import OmniConnectorFactory

    if NAME not in OmniConnectorFactory.list_registered_connectors():
        OmniConnectorFactory.register_connector(NAME, ShmBlocksConnector)
