"""Taking the name of a segment: from nobody, or from the leftover of dead processes.

    1  link the nameless segment to the name; done if the name was free
    2  the name is taken by a living segment of ours, or by a foreign file: `PoolExistsError`
    3  it is taken by a leftover: take *its* lock, look again (somebody may have joined or replaced
       it), unlink it, go to 1

Step 3 holds the leftover's own lock, under which anyone who attaches looks whether it still has its
name: so nobody joins what is being replaced, and of two that replace one fails at step 1 and finds
a living segment at step 2.
"""

from __future__ import annotations

import contextlib
import time

from shmblocks._os.filelock import PLACE_BYTE, PLACE_BYTES, FileLocks
from shmblocks._os.segment import file_identity, link_name, open_existing, unlink_file
from shmblocks._state.identity import is_ours
from shmblocks.errors import IncompatiblePoolError, PoolExistsError, PoolNotFoundError

# Seconds between two looks at a lock that another process holds.
POLL = 1e-3


def anyone_lives(locks: FileLocks) -> bool:
    """Whether a segment, of any layout version, is in use by others than the owner of `locks`."""
    return locks.is_locked_by_others(PLACE_BYTE, PLACE_BYTES)


def take_name(fd: int, name: str, timeout: float) -> None:
    """Give the segment behind `fd` its name; `timeout` seconds for a leftover's lock."""
    while not link_name(fd, name):
        _remove_dead(name, timeout)


def _remove_dead(name: str, timeout: float) -> None:
    try:
        file = open_existing(name)
    except PoolNotFoundError:
        return
    except IncompatiblePoolError as error:
        raise PoolExistsError(str(error)) from error
    with file, contextlib.closing(FileLocks(file.fileno())) as locks:
        if not is_ours(file.fileno()):
            raise PoolExistsError(
                f"pool {name}: a segment that is not a pool holds the name; remove it "
                f"(`rm /dev/shm{name}`) or choose another name"
            )
        if not unlink_dead(file.fileno(), locks, name, timeout):
            raise PoolExistsError(
                f"pool {name}: a living pool holds the name (`shmblocks stat {name[1:]}` shows "
                "who); attach to it, or choose another name"
            )


def unlink_dead(fd: int, locks: FileLocks, name: str, timeout: float) -> bool:
    """Unlink a segment under its own lock; False, and nothing done, when somebody lives in it."""
    deadline = time.monotonic() + timeout
    while not locks.try_enter():
        if anyone_lives(locks) or time.monotonic() >= deadline:
            return False
        time.sleep(POLL)
    if anyone_lives(locks):
        locks.leave()
        return False
    unlink_file(name, file_identity(fd))
    return True
