"""An exception at every line of every operation, in a process that lives on.

`judge.py` says what must be true then: the lock is free, the state is whole, the operation is done
or it is not, what it took is given back, and no descriptor is left.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shmblocks import InvalidStateError
from tests.crash import judge
from tests.crash.fresh import run_without_core
from tests.crash.operations import CASES
from tests.crash.plugin import SUMMARY

pytestmark = pytest.mark.watchdog(600)

INTERRUPTIBLE = [name for name, case in CASES.items() if case.interruptible]


@pytest.mark.parametrize("name", INTERRUPTIBLE)
def test_interrupted_at_any_line_an_operation_is_done_or_not_and_the_lock_is_free(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(judge.interrupt, name, KeyboardInterrupt)
    record_property(SUMMARY, str(coverage))


def test_a_join_interrupted_at_any_line_leaves_no_second_participant_behind() -> None:
    assert run_without_core(judge.interrupt_first_use_after_fork) >= 50


# One that `except Exception` catches, and one that it does not.
@pytest.mark.parametrize(
    ("name", "exception"),
    [
        ("alloc", MemoryError),
        ("attach", MemoryError),
        ("close", MemoryError),
        ("open_", MemoryError),
        ("publish_", SystemExit),
        ("release_the_last", MemoryError),
        # What a signal handler raises that uses the pool in the middle of an operation on it.
        ("alloc", InvalidStateError),
        ("alloc_default", InvalidStateError),
        ("open_", InvalidStateError),
    ],
)
def test_any_exception_at_any_line_does_the_same(
    name: str,
    exception: type[BaseException],
    record_property: Callable[[str, object], None],
) -> None:
    coverage = run_without_core(judge.interrupt, name, exception)
    record_property(SUMMARY, str(coverage))
