"""The program behind the table: `python situations.py SITUATION ACT` with a name in `NAME`.

It puts a process into the situation, lets it do the act there and prints how that went: `works`, or
`refused: ` and the class of the error. What is left of the process the test looks up by itself.

Acts
    create   make a pool and a queue, use both, keep them open to the end
    attach   attach both (the test has made them), use them, keep them open to the end
    use      use both as they came into the situation: inherited, sent, or opened before
    close    close both as they came
    exit     be the last one in both, and end as one ends in this situation

A use ends with a reservation that nobody frees, so that a pool that was left right shows it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.managers
import os
import resource
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig, ShmBlocksError

PATIENCE = 30.0
NOBODY = 65534
# Large enough that no rest of an allocator's arena holds a mapping of it.
CONFIG = PoolConfig(total_tokens=1 << 16, block_size=1 << 10, fields=(Field("x", (128,), "int32"),))

Shared = tuple[BlockPool, HandleQueue[BlockHandle]] | None

# What stays open until the process ends.
kept: list[object] = []


def create(name: str) -> tuple[BlockPool, HandleQueue[BlockHandle]]:
    pool = BlockPool.create(name, CONFIG)
    kept.append(pool)
    return pool, HandleQueue.create(f"{name}-queue", 4, message_type=BlockHandle)


def attach(name: str) -> tuple[BlockPool, HandleQueue[BlockHandle]]:
    pool = BlockPool.attach(name)
    kept.append(pool)
    return pool, HandleQueue.attach(f"{name}-queue", message_type=BlockHandle)


def begin(act: str) -> Shared:
    """What the process has before it comes into the situation."""
    name = os.environ["NAME"]
    return create(name) if act == "exit" else attach(name) if act in ("use", "close") else None


def perform(act: str, shared: Shared) -> None:
    """Do the act and say how it went."""
    try:
        if act == "create":
            shared = create(os.environ["NAME"])
        elif act == "attach":
            shared = attach(os.environ["NAME"])
        assert shared is not None
        kept.append(shared)
        if act == "close":
            for each in shared:
                each.close()
        else:
            use(*shared)
        outcome = "works"
    except (ShmBlocksError, OSError, MemoryError, RuntimeError) as error:
        outcome = f"refused: {type(error).__name__}"
    os.write(1, f"{outcome}\n".encode())


def use(pool: BlockPool, queue: HandleQueue[BlockHandle]) -> None:
    handle = pool.alloc(3, timeout=PATIENCE)
    assert handle is not None
    queue.put(pool.publish(handle), timeout=PATIENCE)
    with pool.open(queue.get(timeout=PATIENCE)):
        pass
    pool.alloc(3)


def close(shared: Shared) -> None:
    for each in shared or ():
        each.close()


# --- processes that are started ---------------------------------------------------------------


def child(act: str, shared: Shared, done: Any, alone: Any) -> None:  # noqa: ANN401
    perform(act, shared)
    done.set()
    alone.wait(PATIENCE)


def started_by(method: str, *, daemon: bool = False) -> Callable[[str], None]:
    def run(act: str) -> None:
        context = multiprocessing.get_context(method)
        done, alone = context.Event(), context.Event()
        shared = begin(act)
        process = context.Process(  # type: ignore[attr-defined]
            target=child, args=(act, shared, done, alone), daemon=daemon
        )
        process.start()
        done.wait(PATIENCE)
        close(shared)
        if not daemon:
            alone.set()
            process.join()

    return run


def in_an_executor(act: str) -> None:
    shared = begin(act)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        executor.submit(perform, act, shared).result()
        close(shared)


class Keeper:
    """An object that lives in a Manager's process."""

    def perform(self, act: str, shared: Shared) -> None:
        perform(act, shared)


class Manager(multiprocessing.managers.BaseManager):
    pass


Manager.register("keeper", Keeper)


def in_a_manager(act: str) -> None:
    shared = begin(act)
    with Manager(ctx=multiprocessing.get_context("spawn")) as manager:
        keeper = manager.keeper()  # type: ignore[attr-defined]
        keeper.perform(act, shared)
        close(shared)


class Samples:
    """A dataset for a DataLoader, of one sample."""

    def __init__(self, act: str, shared: Shared) -> None:
        self.act, self.shared = act, shared

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        perform(self.act, self.shared)
        return index


def in_a_data_loader(act: str) -> None:
    from torch.utils.data import DataLoader

    shared = begin(act)
    samples: Any = Samples(act, shared)
    loader = iter(DataLoader(samples, num_workers=1, persistent_workers=True))
    next(loader)
    close(shared)


# --- ends -------------------------------------------------------------------------------------


def at_exit(act: str) -> None:
    # Handlers run last first: this one before what the pool asked for when it was made.
    shared = begin(act)
    atexit.register(perform, act, shared)


def before_exit_without_cleanup(act: str) -> NoReturn:
    perform(act, begin(act))
    os._exit(0)


def before_exec(act: str) -> NoReturn:
    perform(act, begin(act))
    look = (
        "import os\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    try: path = os.readlink('/proc/self/fd/' + fd)\n"
        "    except OSError: continue\n"
        "    if '/dev/shm' in path: print('inherits', path)\n"
    )
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", look])


# --- limits -----------------------------------------------------------------------------------


def without_rights(act: str) -> None:
    shared = begin(act)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    perform(act, shared)


def without_descriptors(act: str) -> None:
    shared = begin(act)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1, hard))
    while True:
        try:
            os.dup(0)
        except OSError:
            break
    perform(act, shared)


def without_threads(act: str) -> None:
    """As under a limit of processes, which does not bind root."""
    shared = begin(act)

    def refuse(thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse  # type: ignore[method-assign, assignment]
    perform(act, shared)


def without_memory(act: str) -> None:
    shared = begin(act)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()  # what prefaults asks for memory too
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (1 << 23)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    perform(act, shared)


SITUATIONS: dict[str, Callable[[str], None]] = {
    "fork": started_by("fork"),
    "forkserver": started_by("forkserver"),
    "spawn": started_by("spawn"),
    "daemon child": started_by("fork", daemon=True),
    "executor": in_an_executor,
    "Manager": in_a_manager,
    "DataLoader": in_a_data_loader,
    "atexit": at_exit,
    "os._exit": before_exit_without_cleanup,
    "setuid": without_rights,
    "exec": before_exec,
    "no descriptors": without_descriptors,
    "no threads": without_threads,
    "no memory": without_memory,
}

if __name__ == "__main__":
    SITUATIONS[sys.argv[1]](sys.argv[2])
