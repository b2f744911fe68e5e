"""The words that random programs are written in. Each does one thing and checks that it went right.

A failed check raises `Finding`; a finding in a child ends it with another exit code than planned.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NoReturn

from shmblocks import (
    BlockHandle,
    BlockPool,
    Field,
    HandleQueue,
    InvalidStateError,
    Lease,
    PoolClosedError,
    PoolConfig,
    StaleHandleError,
)

NAME = os.environ.get("SHMBLOCKS_TEST_PROGRAM", "")
FIELDS = (
    Field("x", (4,), "int32"),
    Field("m", (3,), "int32", transposed=True),
    Field("raw", (5,), "int8"),
)
CONFIG = PoolConfig(total_tokens=1024, block_size=4, fields=FIELDS, max_participants=16)
Queue = HandleQueue[BlockHandle]
# Seconds until a wait is called a hang. Smaller: a loaded machine is called one.
PATIENCE = 30.0
PLANNED_EXIT = 3
# A message that says nothing but that its sender has come so far.
READY = BlockHandle(0, 1, 1, 0, 0)

# Leases that were dropped in this process, as it was warned.
drops: list[str] = []
# Children of this process.
started: list[Started] = []
# What stays open until the process ends.
kept: list[object] = []


# Shows where a process hangs. A timer of faulthandler would be a
# thread that a forked child waits for.
DUMP_SIGNAL = signal.SIGRTMAX


class Finding(AssertionError):  # noqa: N818
    """The library did something else than the model says."""


class PlannedError(Exception):
    """An exception that the program raises on purpose."""


def require(is_right: bool, what: str) -> None:
    if not is_right:
        raise Finding(what)


def fails(
    errors: type[BaseException] | tuple[type[BaseException], ...],
    act: Callable[..., object],
    *args: object,
) -> None:
    try:
        result = act(*args)
    except errors:
        return
    raise Finding(f"expected {errors} from {act} of {args}, got {result!r}")


# ---- content -----------------------------------------------------------------------------------


def byte(number: int) -> int:
    """What fills allocation `number`, in each byte of each field."""
    return number % 127 + 1


def fill(view: Any, number: int) -> None:  # noqa: ANN401
    for field in FIELDS:
        rows = view.memory(field.name)
        rows[:] = bytes([byte(number)]) * rows.nbytes


def fill_by_torch(view: Any, number: int) -> None:  # noqa: ANN401
    import torch

    for field in FIELDS:
        rows = view[field.name].t() if field.transposed else view[field.name]
        rows.view(torch.uint8).fill_(byte(number))


def expect(view: Any, number: int, tokens: int | None = None) -> None:  # noqa: ANN401
    for field in FIELDS:
        rows = bytes(view.memory(field.name))
        require(
            rows == bytes([byte(number)]) * len(rows) and len(rows) > 0,
            f"allocation {number}, {field.name}: expected {byte(number)}, got {set(rows)}",
        )


# ---- one allocation ----------------------------------------------------------------------------


def alloc(pool: BlockPool, tokens: int, number: int, by_torch: bool = False) -> BlockHandle:
    handle = pool.alloc(tokens, f"request-{number}", timeout=PATIENCE)
    require(handle is not None and handle.num_tokens == tokens, f"alloc({tokens}) gave {handle}")
    assert handle is not None
    (fill_by_torch if by_torch else fill)(pool.view(handle), number)
    return handle


def grow(pool: BlockPool, handle: BlockHandle, tokens: int, number: int) -> BlockHandle:
    larger = pool.grow(handle, handle.num_tokens + tokens)
    if larger is None:
        return handle
    require(larger.start_block == handle.start_block, f"{handle} moved to {larger}")
    if larger.num_tokens != handle.num_tokens:
        fails(StaleHandleError, pool.view, handle)
    expect_rows(pool.view(larger), number, handle.num_tokens)
    fill(pool.view(larger), number)
    return larger


def expect_rows(view: Any, number: int, tokens: int) -> None:  # noqa: ANN401
    rows = bytes(view.memory("x"))[: tokens * 16]
    require(set(rows) == {byte(number)}, f"allocation {number} lost its content: {set(rows)}")


def free(pool: BlockPool, handle: BlockHandle) -> None:
    view = pool.view(handle)
    pool.free(handle)
    fails((InvalidStateError, StaleHandleError), lambda: view.memory("x"))
    fails(StaleHandleError, pool.free, handle)
    fails(StaleHandleError, pool.open, handle)


def publish(pool: BlockPool, handle: BlockHandle, readers: int) -> BlockHandle:
    view = pool.view(handle)
    fails(InvalidStateError, pool.open, handle)
    published = pool.publish(handle, readers=readers)
    fails((InvalidStateError, StaleHandleError), lambda: view.memory("x"))
    return published


def reserved(pool: BlockPool, tokens: int, number: int, way: str) -> BlockHandle:
    """A reservation in a `with` block, which is left by an exception, or with nothing published."""
    with contextlib.suppress(PlannedError), pool.reserve(tokens, timeout=PATIENCE) as reservation:
        fill(reservation, number)
        handle = reservation.handle
        if way == "publishes":
            return reservation.publish(readers=1)
        if way == "fails":
            raise PlannedError
    fails(StaleHandleError, pool.free, handle)
    return handle


def given_back(pool: BlockPool, handle: BlockHandle, number: int) -> None:
    """As if it had never been opened."""
    lease = opened(pool, handle, number)
    lease.give_back()
    fails(InvalidStateError, lambda: lease.memory("x"))


def put(pool: BlockPool, tokens: int, number: int) -> BlockHandle:
    import torch

    value = torch.full((tokens, 32), byte(number), dtype=torch.int8)
    rows = {
        "x": value[:, :16].contiguous().view(torch.int32),
        "m": value[:, :12].contiguous().view(torch.int32).t(),
        "raw": value[:, 1:6],
    }
    return pool.put(rows, timeout=PATIENCE)


def taken(pool: BlockPool, handle: BlockHandle, number: int) -> None:
    for name, rows in pool.take(handle).items():
        found = set(rows.contiguous().view(rows.dtype).numpy(force=True).tobytes())
        require(name == "aux" or found == {byte(number)}, f"allocation {number}, {name}: {found}")


def opened(pool: BlockPool, handle: BlockHandle, number: int) -> Lease:
    lease = pool.open(handle)
    expect(lease, number)
    return lease


def read(pool: BlockPool, handle: BlockHandle, number: int) -> None:
    with pool.open(handle) as lease:
        expect(lease, number)
    lease.release()
    fails(InvalidStateError, lambda: lease.memory("x"))


def read_by_torch(pool: BlockPool, handle: BlockHandle, number: int) -> None:
    import torch

    with torch.inference_mode(), pool.open(handle) as lease:
        rows = lease["raw"]
        require(set(rows.flatten().tolist()) == {byte(number)}, f"allocation {number}: {rows}")
        require(rows.untyped_storage().nbytes() == rows.numel(), "a storage with others' rows")


def cannot_open(pool: BlockPool, handle: BlockHandle) -> None:
    """Every claim was used."""
    fails((StaleHandleError, InvalidStateError), pool.open, handle)


def release(lease: Lease, number: int) -> None:
    expect(lease, number)
    lease.release()
    require(lease.is_released, "a lease that is released says that it is open")


def is_not_copied(lease: Lease, number: int) -> None:
    for act in (copy.copy, copy.deepcopy, pickle.dumps):
        fails(TypeError, act, lease)
    gc.collect()
    expect(lease, number)


# ---- torch -------------------------------------------------------------------------------------


def misuse(pool: BlockPool, handle: BlockHandle, number: int, how: str) -> None:
    """What must not lead into anyone else's data, nor outlive this one view."""
    import torch

    rows = pool.view(handle)["x"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "share":
            with contextlib.suppress(RuntimeError):
                rows.share_memory_()  # type: ignore[no-untyped-call]
        elif how == "out":
            fails(RuntimeError, lambda: torch.zeros(len(rows) + 9, 4, dtype=rows.dtype, out=rows))
        elif how == "grad":
            weight = torch.ones(4, requires_grad=True)
            with contextlib.suppress(RuntimeError):
                rows.copy_(torch.ones(len(rows), 4) * weight)
        elif how == "resize":
            fails(RuntimeError, rows.resize_, len(rows) + 1000, 4)
        elif how == "copies":
            require(len(pickle.dumps(rows)) < rows.numel() * 4 + 4096, "a large pickle")
            require(copy.deepcopy(rows).untyped_storage().nbytes() == rows.numel() * 4, "deepcopy")
        elif how == "set":
            rows.data = torch.zeros(1, 4, dtype=rows.dtype)
        else:
            with torch.inference_mode():
                pool.view(handle)["x"].zero_()
    fill_by_torch(pool.view(handle), number)
    expect(pool.view(handle), number)
    require(not pool.view(handle)["x"].requires_grad, "a new view requires gradients")


# ---- the pool as a whole -----------------------------------------------------------------------


def pickled(pool: BlockPool) -> None:
    """Another object of the same pool is the same participant."""
    twin = pickle.loads(pickle.dumps(pool))
    handle = twin.alloc(1, timeout=PATIENCE)
    require(twin.participant == pool.participant, "one process is two participants")
    del twin
    pool.free(handle)


def pickled_handle(handle: BlockHandle) -> None:
    require(pickle.loads(pickle.dumps(handle)) == handle, "pickling changed a handle")
    require(BlockHandle.decode(handle.encode()) == handle, "encoding changed a handle")


def close_and_attach(pool: BlockPool) -> BlockPool:
    pool.close()
    pool.close()
    fails(PoolClosedError, pool.alloc, 1)
    return BlockPool.attach(NAME, timeout=PATIENCE)


def refused(pool: BlockPool) -> None:
    fails(ValueError, pool.alloc, 0)
    fails(ValueError, pool.alloc, 1025)
    fails(TypeError, pool.open, b"no handle")


def quiet(pool: BlockPool, live: int) -> None:
    """Nobody else runs: the pool has what the model says, and is right."""
    pool.reap()
    stats = pool.stats()
    require(stats.allocations == live, f"{live} allocations expected: {pool.allocations()}")
    require(stats.dead_participants == 0, f"somebody is dead after reap: {pool.participants()}")
    require(stats.participants == 1, f"somebody is still there: {pool.participants()}")
    require(stats.waiters == 0, f"{stats.waiters} waiters")
    require(pool.check() == [], f"violations: {pool.check()}")


def wait_for_room(name: str, by: str) -> None:
    """A pool of this process alone, full, and a thread that makes room."""
    with BlockPool.create(f"{NAME}-{name}", PoolConfig(total_tokens=16, block_size=4)) as pool:
        first = pool.alloc(16)
        assert first is not None
        timer = threading.Timer(0.005, pool.free, (first,))
        timer.start()
        second: BlockHandle | None
        if by == "asyncio":
            second = asyncio.run(cancel_one_and_wait(pool))
        else:
            second = pool.alloc(13, timeout=PATIENCE)
        timer.join()
        require(second is not None and second.num_blocks == 4, f"waited and got {second}")
        require(pool.stats().waiters == 0, "still waits")


async def cancel_one_and_wait(pool: BlockPool) -> BlockHandle:
    cancelled = asyncio.create_task(pool.alloc_async(16))
    waiting = asyncio.create_task(pool.alloc_async(13, timeout=PATIENCE))
    await asyncio.sleep(0)
    cancelled.cancel()
    (came,) = await asyncio.gather(cancelled, return_exceptions=True)
    if isinstance(came, BlockHandle):
        pool.free(came)  # the room was there before
    elif not isinstance(came, asyncio.CancelledError):
        raise Finding(f"a cancelled wait ended with {came!r}")
    return await waiting


def tasks(pool: BlockPool, queue: Queue, number: int, method: str) -> None:
    """An executor whose tasks get the pool as an argument."""
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        futures = [executor.submit(task, pool, queue, number) for _ in range(20)]
        for _ in futures:
            read(pool, queue.get(timeout=PATIENCE), number)
        workers = {future.result() for future in futures}
        people = pool.stats().participants
        require(people <= len(workers) + 1, f"{people} participants in {len(workers)} workers")


def task(pool: BlockPool, queue: Queue, number: int) -> int:
    queue.put(pool.publish(alloc(pool, 3, number)))
    return os.getpid()


# ---- signals -----------------------------------------------------------------------------------


@contextlib.contextmanager
def beats() -> Iterator[None]:
    """A signal every two milliseconds, whose handler collects garbage."""
    signal.signal(signal.SIGALRM, lambda *_: gc.collect(0))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupted(wait: Callable[[], object], seconds: float) -> None:
    """A wait for what does not come, ended by an exception of a signal's handler."""

    def interrupt(*_: object) -> NoReturn:
        raise PlannedError

    old = signal.signal(signal.SIGUSR1, interrupt)
    begun = threading.Event()

    def send() -> None:
        begun.wait()
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        begun.set()
        result = wait()
        raise Finding(f"a wait without end gave {result!r}")
    except PlannedError:
        pass
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, old)


def interrupted_at_any_line(pool: BlockPool, seconds: float) -> None:
    """Allocates and frees until an exception comes from a signal's handler. What the *caller* loses
    at such a moment comes back with its process, so this is for children that end."""

    def work() -> NoReturn:
        while True:
            handle = pool.alloc(3, timeout=PATIENCE)
            assert handle is not None
            pool.free(handle)

    interrupted(work, seconds)


# ---- processes ---------------------------------------------------------------------------------


class Started:
    """A child or a thread that runs one of the program's functions."""

    def __init__(self, method: str, function: Callable[..., None], *args: Any) -> None:  # noqa: ANN401
        self.thread: threading.Thread | None = None
        self.errors: list[str] = []
        if method == "thread":
            self.thread = threading.Thread(target=self._run_thread, args=(function, args))
            self.thread.start()
            return
        daemon = method == "daemon"
        context: Any = multiprocessing.get_context("fork" if daemon else method)
        self.process = context.Process(target=run_child, args=(function, args), daemon=daemon)
        self.process.start()
        started.append(self)

    def join(self, code: int) -> None:
        if self.thread is not None:
            self.thread.join(PATIENCE)
            require(not self.errors, "".join(self.errors))
        else:
            self.process.join(PATIENCE)
            found = self.process.exitcode
            require(found == code, f"{self.process}: expected to end with {code}, got {found}")

    def give_up(self) -> None:
        """After a finding: show where it is, and end it, or the exit would wait for it."""
        if self.process.is_alive():
            self.kill(DUMP_SIGNAL)
            time.sleep(0.5)
            self.process.kill()

    def kill(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def _run_thread(self, function: Callable[..., None], args: tuple[object, ...]) -> None:
        try:
            function(*args)
        except BaseException:  # noqa: BLE001  (`join` tells it)
            self.errors.append(traceback.format_exc())


def run_child(function: Callable[..., None], args: tuple[object, ...]) -> None:
    prepare()
    try:
        with nobody_is_left_after_a_finding():
            function(*args)
    except PlannedError:
        sys.exit(PLANNED_EXIT)


@contextlib.contextmanager
def nobody_is_left_after_a_finding() -> Iterator[None]:
    try:
        yield
    except (PlannedError, SystemExit):
        raise
    except BaseException:
        for each in started:
            each.give_up()
        raise


def prepare() -> None:
    """In every process first: warnings of dropped leases are counted, all others told."""
    drops.clear()
    kept.clear()
    started.clear()
    show = warnings.showwarning

    def count(message: Any, *rest: Any) -> None:  # noqa: ANN401
        if "lease was not released" in str(message):
            drops.append(str(message))
        else:
            show(message, *rest)

    warnings.showwarning = count  # type: ignore[assignment]
    warnings.simplefilter("always")
    if sys.version_info >= (3, 12):
        # Forking beside threads is one of the things to get right.
        warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)
    faulthandler.register(DUMP_SIGNAL, all_threads=True)


def end(expected_drops: int) -> None:
    """The end of a process that ends in an orderly way."""
    require(len(drops) == expected_drops, f"{expected_drops} dropped leases, warned of {drops}")


def sleep_for_ever(queue: Queue) -> None:
    """Waits in the kernel for a message that does not come."""
    queue.get(timeout=4 * PATIENCE)


def run(main: Callable[..., None], queues: int) -> None:
    """The whole program."""
    prepare()
    with nobody_is_left_after_a_finding(), contextlib.ExitStack() as stack:
        pool = stack.enter_context(BlockPool.create(NAME, CONFIG))
        mailboxes = [
            stack.enter_context(HandleQueue.create(f"{NAME}-q{n}", 64, message_type=BlockHandle))
            for n in range(queues + 1)
        ]
        main(pool, *mailboxes)
    left = [path for path in map(target, os.listdir("/proc/self/fd")) if "/dev/shm/" in path]
    ours = [path for path in left if NAME in path or "#" in path]
    # A lease that is kept, released by the closing or not, keeps the mapping.
    require(not ours or bool(kept), f"descriptors left: {ours}")
    names = [each.name for each in threading.enumerate() if "shmblocks" in each.name]
    require(not names, f"threads left: {names}")
    print("right")


def target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
