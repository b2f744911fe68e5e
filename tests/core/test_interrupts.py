"""Regressions: interrupts at single lines that once lost or took something.

The harness that interrupts every line of every operation is elsewhere; these say what went wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from shmblocks import BlockHandle, BlockPool
from shmblocks._os.filelock import FileLocks
from shmblocks._state.journal import Journal
from shmblocks._state.pool_state import PoolState
from shmblocks._state.shared_segment import SharedSegment
from tests.core import pools
from tests.core.conftest import require_right
from tests.core.test_mutex import Interrupter


def test_an_interrupted_alloc_frees_nothing_of_who_got_its_generation(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before its commit it has used up no generation: the next, of whomever, has it."""
    pool.state.core = None  # nothing interrupts it within a commit
    with pools.attach(pool.name) as other:
        mutex = pool.state.mutex
        leave = mutex.leave

        def interrupted(journal: Journal, stores: object) -> None:
            monkeypatch.undo()
            monkeypatch.setattr(mutex, "leave", leave_and_let_the_other_in)
            raise KeyboardInterrupt

        taken: list[BlockHandle] = []

        def leave_and_let_the_other_in(token: list[int]) -> None:
            leave(token)
            if not taken:
                taken.append(pools.take(other, 9))

        monkeypatch.setattr(Journal, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.alloc(9)
        monkeypatch.undo()
        assert other.view(taken[0]).num_tokens == 9
        other.free(taken[0])
    assert pool.available_blocks() == 16


def interrupt_lines(
    functions: list[Callable[..., object]], act: Callable[[], object], after: Callable[[], None]
) -> int:
    """Interrupt `act` at each line of the functions in turn; at how many that was."""
    at = 0
    while Interrupter({function.__code__ for function in functions}, at).run(act):
        after()
        at += 1
    after()
    return at


def test_an_interrupted_close_keeps_the_lock_from_nobody(
    pool: BlockPool,
) -> None:
    stranger = pools.locks_of(pool.name)
    closing: list[BlockPool] = []

    def close_one() -> None:
        closing.append(pools.attach(pool.name))
        closing[-1].close()

    def after() -> None:
        assert not pools.is_entered(stranger)
        require_right(pool)
        closing.pop().close()
        assert len(pool.participants()) == 1

    lines = interrupt_lines(
        [
            FileLocks.close,
            inspect.unwrap(SharedSegment._leave),
            PoolState._give_back,
            PoolState.leave,
            SharedSegment.leave,
            SharedSegment.drop,
            BlockPool.close,
        ],
        close_one,
        after,
    )
    assert lines >= 10
    stranger.close()
