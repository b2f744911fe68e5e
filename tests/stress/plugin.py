"""For the process that starts a run: makes the pool, and judges it when all workers have ended.

Loaded there by the `conftest.py` beside it when that is on the command line's way, or as one of
`pytest_plugins`. In a worker it only judges what it can see while others go on.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from shmblocks import BlockPool
from tests.stress import arena


class Arena(NamedTuple):
    """The pool and the box, as this process has them."""

    pool: BlockPool
    box: arena.Box


ARENA = pytest.StashKey[Arena]()
VERDICT = pytest.StashKey[list[str]]()


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def arena_of(config: pytest.Config) -> Arena:
    """This process's way in, made at the first need."""
    if ARENA not in config.stash:
        config.stash[ARENA] = Arena(arena.join(), arena.Box())
    return config.stash[ARENA]


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and not is_worker(config):
        arena_of(config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Judge and close; what is wrong fails the run.

    Without an order of its own it comes after the workers have ended (pytest-xdist, registered
    later, waits for them in its own hook) and before the check for what the run has left behind
    (which asks to be last).
    """
    stash = session.config.stash
    if ARENA not in stash:
        return
    pool, box = stash[ARENA]
    alone = len(pool.participants()) == 1
    wrong = arena.judge(pool, box, is_alone=alone)
    pool.close()
    if alone:
        box.remove()
    del stash[ARENA]
    if wrong and is_worker(session.config):
        raise AssertionError("\n".join(wrong))
    stash[VERDICT] = wrong
    if wrong and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    wrong = config.stash.get(VERDICT, [])
    if wrong:
        terminalreporter.section("the pool that all workers used is wrong", red=True)
        terminalreporter.write_line("\n".join(wrong))
