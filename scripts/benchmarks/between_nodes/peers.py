"""What else moves memory between nodes over TCP.

    zmq       one REQ and one REP socket; what came is copied into the pool (zmq gives its own
              memory)
    NIXL      READ over UCX/TCP from pool to pool, as NODES.md's study does it: no lease, no grant
    Mooncake  READ over its TCP transport, likewise

NIXL and Mooncake copy nothing and hold nothing: what a reader and a source would have to say to
each other around a READ is not in their times.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from typing import Any, cast

from benchmarks.between_nodes.kit import LOOPBACK, Along, NotHereError, Nothing, own_pool, size_of
from shmblocks import BlockHandle, BlockPool

# ---- zmq ---------------------------------------------------------------------------------------


class ZmqSource(Nothing):
    def __init__(self, stack: contextlib.ExitStack, most: int) -> None:
        zmq = _module("zmq", "pyzmq")
        context = zmq.Context()
        replying = context.socket(zmq.REP)
        self.told = replying.bind_to_random_port(f"tcp://{LOOPBACK}")
        along = Along(most)

        def reply() -> None:
            with contextlib.suppress(zmq.ContextTerminated):
                while True:
                    count = int.from_bytes(replying.recv(), "little")
                    replying.send(along.next(count), copy=False)
            replying.close(linger=0)

        thread = threading.Thread(target=reply, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(context.term)


def zmq_source(stack: contextlib.ExitStack, _: str, most: int, __: object) -> ZmqSource:
    return ZmqSource(stack, most)


class ZmqReader:
    def __init__(self, pool: BlockPool, asking: Any) -> None:  # noqa: ANN401 - zmq.Socket
        self._pool = pool
        self._asking = asking

    def carry(self, tokens: int, _: object) -> None:
        self._asking.send(size_of(tokens).to_bytes(8, "little"))
        came = memoryview(self._asking.recv(copy=False).buffer)
        with self._pool.reserve(tokens) as reservation:
            start = 0
            for name in reservation:
                memory = reservation.memory(name)
                memory[:] = came[start : start + len(memory)]
                start += len(memory)


def zmq_reader(stack: contextlib.ExitStack, name: str, most: int, told: object) -> ZmqReader:
    zmq = _module("zmq", "pyzmq")
    context = stack.enter_context(zmq.Context())
    asking = stack.enter_context(context.socket(zmq.REQ))
    asking.connect(f"tcp://{LOOPBACK}:{told}")
    return ZmqReader(own_pool(stack, name, most), asking)


# ---- both that read memory ---------------------------------------------------------------------

Pairs = list[tuple[int, int]]  # address and bytes


def regions_of(pool: BlockPool) -> Pairs:
    """Where the fields lie in this process."""
    with pool.reserve(pool.config.total_tokens, timeout=0.0) as reservation:
        return _pairs(reservation.memory(name) for name in reservation)


def _pairs(memories: Any) -> Pairs:  # noqa: ANN401 - any iterable of memoryviews
    return [
        (ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory)) for memory in memories
    ]


class PoolSource:
    """Publishes, and says where it lies; what was published before is freed."""

    def __init__(self, pool: BlockPool, told: object) -> None:
        self._pool = pool
        self._before: BlockHandle | None = None
        self.told = told

    def prepare(self, tokens: int) -> object:
        if self._before is not None:
            self._pool.free(self._before)
        with self._pool.reserve(tokens, timeout=10.0) as reservation:
            pairs = _pairs(reservation.memory(name) for name in reservation)
            self._before = reservation.publish()
            return pairs


class ReadsMemory:
    """A reader whose engine reads from address to address."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def carry(self, tokens: int, prepared: object) -> None:
        with self._pool.reserve(tokens) as reservation:
            here = _pairs(reservation.memory(name) for name in reservation)
            self._read(here, cast("Pairs", prepared))

    def _read(self, here: Pairs, there: Pairs) -> None:
        raise NotImplementedError


# ---- NIXL --------------------------------------------------------------------------------------


def _nixl_agent(name: str, regions: Pairs) -> Any:  # noqa: ANN401 - it has no types
    os.environ.setdefault("UCX_MODULES", "^ib")  # the system's libibverbs crashes it at its end
    os.environ.setdefault("UCX_TLS", "tcp")  # not this machine's own memory: as between nodes
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    for package in ("nixl_cu12", "nixl_cu13", "nixl"):
        with contextlib.suppress(ImportError):
            api = __import__(f"{package}._api", fromlist=["nixl_agent"])
            break
    else:
        raise NotHereError("NIXL is not installed (pip install nixl-cu12)")
    agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))
    agent.register_memory([(start, size, 0, "") for start, size in regions], "DRAM")
    return agent


def nixl_source(stack: contextlib.ExitStack, name: str, most: int, _: object) -> PoolSource:
    pool = own_pool(stack, name, most)
    agent = _nixl_agent(name, regions_of(pool))
    source = PoolSource(pool, agent.get_agent_metadata())
    vars(source)["agent"] = agent  # lives as long
    return source


class NixlReader(ReadsMemory):
    def __init__(self, pool: BlockPool, agent: Any, told: object) -> None:  # noqa: ANN401
        super().__init__(pool)
        self._agent = agent
        self._remote = agent.add_remote_agent(told)

    def _read(self, here: Pairs, there: Pairs) -> None:
        agent = self._agent
        local = agent.get_xfer_descs([(start, size, 0) for start, size in here], "DRAM")
        remote = agent.get_xfer_descs([(start, size, 0) for start, size in there], "DRAM")
        transfer = agent.initialize_xfer("READ", local, remote, self._remote, b"")
        state = agent.transfer(transfer)
        while state == "PROC":
            time.sleep(100e-6)
            state = agent.check_xfer_state(transfer)
        agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise RuntimeError(f"NIXL: the READ ended as {state}")


def nixl_reader(stack: contextlib.ExitStack, name: str, most: int, told: object) -> NixlReader:
    pool = own_pool(stack, name, most)
    return NixlReader(pool, _nixl_agent(name, regions_of(pool)), told)


# ---- Mooncake ----------------------------------------------------------------------------------


def _mooncake_engine(regions: Pairs) -> Any:  # noqa: ANN401 - it has no types
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise NotHereError(f"Mooncake: {error}") from None
    engine = TransferEngine()
    if engine.initialize(LOOPBACK, "P2PHANDSHAKE", "tcp", ""):
        raise NotHereError("Mooncake: its engine does not start")
    for start, size in regions:
        engine.register_memory(start, size)
    return engine


def mooncake_source(stack: contextlib.ExitStack, name: str, most: int, _: object) -> PoolSource:
    pool = own_pool(stack, name, most)
    engine = _mooncake_engine(regions_of(pool))
    source = PoolSource(pool, f"{LOOPBACK}:{engine.get_rpc_port()}")
    vars(source)["engine"] = engine  # lives as long
    return source


class MooncakeReader(ReadsMemory):
    def __init__(self, pool: BlockPool, engine: Any, told: object) -> None:  # noqa: ANN401
        super().__init__(pool)
        self._engine = engine
        self._session = str(told)

    def _read(self, here: Pairs, there: Pairs) -> None:
        failed = self._engine.batch_transfer_sync_read(
            self._session,
            [start for start, _ in here],
            [start for start, _ in there],
            [size for _, size in here],
        )
        if failed:
            raise RuntimeError(f"Mooncake: the READ ended with {failed}")


def mooncake_reader(
    stack: contextlib.ExitStack, name: str, most: int, told: object
) -> MooncakeReader:
    pool = own_pool(stack, name, most)
    return MooncakeReader(pool, _mooncake_engine(regions_of(pool)), told)


def _module(name: str, package: str) -> Any:  # noqa: ANN401 - a module
    try:
        return __import__(name)
    except ImportError:
        raise NotHereError(f"{package} is not installed") from None
