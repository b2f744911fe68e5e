"""The one pool of a run that every worker hammers, and the box in which they exchange handles.

- The pool is made by the process that starts the run, when that has loaded `tests.stress.plugin`,
  and otherwise by the first worker that needs it. Its name is the same in all of them.
- The box is a folder with a file for each handle: it needs nothing of the library, which is what is
  being tested. Who removes the file has the handle; nobody else ever sees it again.
- `judge` is for when everybody has stopped: it takes out what nobody took, and then every block
  must be free and every invariant hold.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from shmblocks import BlockHandle, BlockPool, Field, PoolConfig, PoolExistsError, PoolNotFoundError
from tests.support import naming

# 8 bytes a token, so that every row of a payload holds one stamp.
STAMP = Field("stamp", (), "int64")
BLOCK_SIZE = 16
CONFIG = PoolConfig(
    total_tokens=512 * BLOCK_SIZE,
    block_size=BLOCK_SIZE,
    fields=(STAMP,),
    default_num_blocks=4,
    max_participants=256,
    max_leases=512,
    # A handle may lie in the box from one storm to the next, and other tests are run in between.
    unclaimed_timeout=86400.0,
)
# Handles that are on their way. Smaller: putters often keep theirs. Larger: they fill the pool.
BOX_SIZE = 16


def pool_name() -> str:
    return f"{naming.run_prefix()}-stress"


def join() -> BlockPool:
    """The run's pool; made here if nobody has made it yet."""
    pool = _join()
    # The first lease maps the fields a second time, for as long as the pool is open: here, so that
    # no test is blamed for it.
    handle = pool.alloc(1, timeout=60.0)
    assert handle is not None
    pool.open(pool.publish(handle)).release()
    return pool


def _join() -> BlockPool:
    while True:
        try:
            return BlockPool.attach(pool_name(), role="stress", prefault="off")
        except PoolNotFoundError:
            with contextlib.suppress(PoolExistsError):
                return BlockPool.create(pool_name(), CONFIG, role="stress", prefault="off")


class Box:
    """Where handles lie that their allocators have given away."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir(), pool_name())
        self._folder.mkdir(exist_ok=True)

    def put(self, handle: BlockHandle) -> bool:
        """Whether there was room."""
        if len(os.listdir(self._folder)) >= BOX_SIZE:
            return False
        # Written under another name first: whoever sees the handle sees all of it.
        unseen = self._folder / f".{handle.generation}"
        unseen.write_bytes(handle.encode())
        unseen.rename(self._folder / str(handle.generation))
        return True

    def take(self) -> BlockHandle | None:
        """The oldest, if there is one."""
        for name in sorted(os.listdir(self._folder)):
            path = self._folder / name
            if not name.startswith("."):
                try:
                    data = path.read_bytes()
                    path.unlink()
                except FileNotFoundError:
                    continue  # another was faster
                return BlockHandle.decode(data)
        return None

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def judge(pool: BlockPool, box: Box, *, is_alone: bool) -> list[str]:
    """What is wrong with the pool after the storm; `is_alone`: nobody else uses it any more."""
    while (handle := box.take()) is not None:
        pool.free(handle)
    wrong = [str(each) for each in pool.check()]
    if is_alone and pool.available_blocks() != CONFIG.total_blocks:
        wrong += [f"left in the pool: {each}" for each in pool.allocations()]
    return wrong
