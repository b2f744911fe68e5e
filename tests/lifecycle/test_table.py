"""What happens to a process that creates, attaches, uses, closes or ends, in every situation.

A cell says how the act goes in that process, and what is left when all its processes have ended:

    works              it did what it does anywhere
    refused: X         it raised X and changed nothing
    nothing left       nobody's help was needed: no name, no participant, no reservation
    reaped             its slot and its reservation came back when somebody next asked for them
    replaced           the name is a leftover of the dead; the next `create` takes it over
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from shmblocks import BlockPool, HandleQueue
from shmblocks.inspector import list_segments
from tests.lifecycle import situations
from tests.support import procfs
from tests.support.children import run_program, wait_until

ROOT = Path(__file__).resolve().parents[2]
# Paths of other interpreters that have msgspec and posix_ipc, separated by colons.
PYTHONS_VARIABLE = "SHMBLOCKS_TEST_PYTHONS"

ACTS = ("create", "attach", "use", "close", "exit")
LEAVES = "works, nothing left"
REAPED = "works, reaped"
REPLACED = "works, replaced"
FULL = "refused: SharedMemoryFullError, nothing left"
EMFILE = "refused: OSError, nothing left"

TABLE: dict[str, tuple[str, str, str, str, str]] = {
    # situation        create    attach    use       close   exit
    "fork": (LEAVES, LEAVES, LEAVES, LEAVES, LEAVES),
    "forkserver": (LEAVES, LEAVES, LEAVES, LEAVES, LEAVES),
    "spawn": (LEAVES, LEAVES, LEAVES, LEAVES, LEAVES),
    # Ended by SIGTERM when its parent ends, like any killed one; what its parent had too, the
    # parent takes away after it.
    "daemon child": (REPLACED, REAPED, REAPED, LEAVES, LEAVES),
    "executor": (LEAVES, LEAVES, LEAVES, LEAVES, LEAVES),
    "Manager": (LEAVES, LEAVES, LEAVES, LEAVES, LEAVES),
    "DataLoader": (LEAVES, LEAVES, LEAVES, LEAVES, LEAVES),
    "atexit": (LEAVES, LEAVES, LEAVES, LEAVES, LEAVES),
    # Nothing of ours runs at such an end.
    "os._exit": (REPLACED, REAPED, REAPED, LEAVES, REPLACED),
    # The segment is another user's then: it can be used as far as it was open, but its name is not
    # for this user to remove (/dev/shm is sticky).
    "setuid": (LEAVES, "refused: PoolPermissionError, nothing left", LEAVES, LEAVES, REPLACED),
    # The new program has nothing of the old one's, not even its descriptors.
    "exec": (REPLACED, REAPED, REAPED, LEAVES, REPLACED),
    "no descriptors": (EMFILE, EMFILE, LEAVES, LEAVES, LEAVES),
    "no threads": (LEAVES, LEAVES, LEAVES, LEAVES, LEAVES),
    "no memory": (FULL, FULL, LEAVES, LEAVES, LEAVES),
}

CELLS = [(situation, act) for situation in TABLE for act in ACTS]
# What depends on the version of Python: how processes start and how they end.
ELSEWHERE = ("fork", "forkserver", "spawn", "daemon child", "executor", "Manager", "atexit")


def what_happens(name: str, python: str, situation: str, act: str) -> str:
    """Run the cell's program, and say what it said and what is left of it."""
    environment = {"NAME": name, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-W", "default", situations.__file__, situation, act]
    if act in ("create", "exit"):
        done = run_program(command, environment=environment)
        left = left_of_segments(name)
    else:
        pool, queue = make(name)
        with pool, queue:
            done = run_program(command, environment=environment)
            left = left_of_participants(pool)
    assert done.stderr == ""
    return f"{done.stdout.strip()}, {left}"


def make(name: str) -> tuple[BlockPool, HandleQueue[bytes]]:
    pool = BlockPool.create(name, situations.CONFIG, prefault="off")
    return pool, HandleQueue.create(f"{name}-queue", 4)


def left_of_segments(name: str) -> str:
    if not list(procfs.segments(name)):
        return "nothing left"
    wait_until(
        lambda: {each.state for each in list_segments() if name in each.name} <= {"dead"},
        "those who were killed are gone",
    )
    pool, queue = make(name)
    with pool, queue:
        assert pool.available_blocks() == pool.config.total_blocks
    return "replaced"


def left_of_participants(pool: BlockPool) -> str:
    wait_until(lambda: pool.stats().participants == 1, "all others are gone")
    stats = pool.stats()
    if (stats.dead_participants, stats.reserved_blocks) == (0, 0):
        return "nothing left"
    pool.reap()
    stats = pool.stats()
    assert (stats.dead_participants, stats.reserved_blocks) == (0, 0)
    return "reaped"


@pytest.mark.parametrize(("situation", "act"), CELLS)
def test_what_the_table_says_is_what_happens(pool_name: str, situation: str, act: str) -> None:
    if situation == "setuid" and os.geteuid() != 0:
        pytest.skip("only root can give up its rights")
    assert what_happens(pool_name, sys.executable, situation, act) == cell(situation, act)


@pytest.mark.parametrize("situation", ELSEWHERE)
@pytest.mark.parametrize("python", os.environ.get(PYTHONS_VARIABLE, "-").split(":"))
def test_another_python_does_the_same(pool_name: str, python: str, situation: str) -> None:
    if python == "-":
        pytest.skip(f"{PYTHONS_VARIABLE} names no other Python with msgspec and posix_ipc")
    for act in ACTS:
        found = what_happens(pool_name, python, situation, act)
        assert (act, found) == (act, cell(situation, act))


def cell(situation: str, act: str) -> str:
    return TABLE[situation][ACTS.index(act)]


def test_the_table_has_a_row_for_each_situation_and_a_program_for_each_row() -> None:
    assert list(TABLE) == list(situations.SITUATIONS)
