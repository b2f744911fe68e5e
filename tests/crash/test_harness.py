"""The harness finds what it is there to find, and nothing where there is nothing."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shmblocks import BlockPool
from shmblocks._state.layout import H_FREE_BLOCKS
from shmblocks.testing import (
    Coverage,
    Point,
    Scope,
    Step,
    TooSlowError,
    Wire,
    abandon,
    assert_survives,
    cont,
    die,
    interrupt_at_every_line,
    kill_at_every_line,
    remember,
    run_and_kill,
    run_forked,
    stop,
    within,
)
from tests.crash import toys
from tests.crash.scenes import CONFIG, fill, publish, reserve, survivor
from tests.support.children import wait_until

TOYS = Scope([toys], library=False)


def is_whole(scene: toys.Account, _: Point) -> None:
    assert scene.is_whole, "half of it was moved"


def test_every_line_of_an_operation_is_killed_at_and_no_other() -> None:
    coverage = kill_at_every_line(toys.account, toys.move_at_once, is_whole, scope=TOYS)
    first = coverage.points[0].line
    assert [point.line - first for point in coverage.points] == [0, 1, 2]
    assert str(coverage) == "move_at_once: killed at each of its 3 lines"


def test_a_change_in_two_steps_is_found() -> None:
    with pytest.raises(AssertionError, match=r"killed at point 2 \(toys.py:\d+ in move\)"):
        kill_at_every_line(toys.account, toys.move_in_two_steps, is_whole, scope=TOYS)
    with pytest.raises(AssertionError, match="KeyboardInterrupt raised at point 2"):
        interrupt_at_every_line(toys.account, toys.move_in_two_steps, is_whole, scope=TOYS)


def test_one_death_for_each_state_finds_what_a_death_at_each_line_finds() -> None:
    def move_and_check(names: str | None) -> Coverage:
        return kill_at_every_line(
            toys.account, toys.move_with_much_in_between, accept, scope=TOYS, one_per_state=names
        )

    killed_at: list[Point] = []

    def accept(scene: toys.Account, point: Point) -> None:
        killed_at.append(point)

    every_line = move_and_check(None)
    del killed_at[:]
    coverage = move_and_check("none of these")
    assert coverage.points == every_line.points
    assert str(coverage) == (
        f"move_with_much_in_between: killed at 2 of its {len(coverage.points)} lines, one for each "
        "state"
    )
    # Before the first step, after it, and at the end.
    assert [point.number for point in killed_at] == [
        1,
        len(coverage.points) - 1,
        killed_at[-1].number,
    ]
    assert killed_at[-1].is_end
    with pytest.raises(AssertionError, match=r"half of it was moved"):
        kill_at_every_line(
            toys.account, toys.move_in_two_steps, is_whole, scope=TOYS, one_per_state="none"
        )


def test_a_name_that_comes_or_goes_is_a_state(pool_name: str) -> None:
    def remove(_: toys.Account, __: Point) -> None:
        Path("/dev/shm", pool_name).unlink(missing_ok=True)

    coverage = kill_at_every_line(
        toys.account, toys.name_and_unname(pool_name), remove, scope=TOYS, one_per_state=pool_name
    )
    # Before the name; with it. Gone again is what was before.
    assert (coverage.done, len(coverage.points)) == (2, 4)


def test_one_death_for_each_state_is_refused_where_somebody_else_changes_it() -> None:
    with pytest.raises(ValueError, match="one_per_state"):
        kill_at_every_line(
            toys.account, toys.move_at_once, is_whole, with_fork=True, one_per_state=""
        )


def test_what_is_mended_survives_an_interrupt_and_no_kill() -> None:
    interrupt_at_every_line(toys.account, toys.move_and_mend, lambda scene, point: None, scope=TOYS)
    with pytest.raises(AssertionError, match="half of it was moved"):
        kill_at_every_line(toys.account, toys.move_and_mend, is_whole, scope=TOYS)


def test_bytecode_instructions_are_finer_than_lines() -> None:
    coverage = kill_at_every_line(
        toys.account, toys.move_at_once, is_whole, scope=TOYS, step=Step.OPCODE
    )
    assert len(coverage.points) > 10
    assert len({point.offset for point in coverage.points}) == len(coverage.points)


def test_a_swallowed_interrupt_is_found() -> None:
    with pytest.raises(AssertionError, match="swallowed KeyboardInterrupt"):
        interrupt_at_every_line(
            toys.account, toys.move_and_hide, lambda scene, point: None, scope=TOYS
        )


def test_an_operation_with_other_lines_each_time_is_found() -> None:
    with pytest.raises(AssertionError, match="expected"):
        interrupt_at_every_line(
            toys.account, toys.move_differently_each_time, lambda scene, point: None, scope=TOYS
        )


def test_an_operation_of_which_nothing_is_watched_is_found() -> None:
    with pytest.raises(AssertionError, match="no line of what is watched"):
        kill_at_every_line(toys.account, lambda _: lambda: None, is_whole, scope=TOYS)


def test_an_operation_that_fails_by_itself_is_told_with_its_traceback() -> None:
    def failing(_: toys.Account) -> object:
        raise LookupError("of its own")

    with pytest.raises(AssertionError, match="LookupError: of its own"):
        kill_at_every_line(toys.account, failing, is_whole, scope=TOYS)  # type: ignore[arg-type]


def test_a_child_that_hangs_is_killed_and_told() -> None:
    def hang(tell: Callable[[bytes], None]) -> None:
        tell(b"last words")
        threading.Event().wait()

    with pytest.raises(TimeoutError, match="told: 'last words'"):
        run_forked(hang, timeout=0.2)


def test_what_a_child_raises_is_told() -> None:
    ending = run_forked(lambda _: die())
    assert ending.was_killed
    ending = run_forked(lambda _: int("x"))  # type: ignore[arg-type]
    assert ending.exit_code == 1
    assert b"ValueError" in ending.told


def test_one_dies_at_the_point_that_was_named(pool_name: str) -> None:
    with BlockPool.create(pool_name, CONFIG, prefault="off") as pool:
        point = run_and_kill(lambda: pool.alloc(9), lambda point: point.function == "commit")
        assert point.function == "commit"
        assert run_and_kill(lambda: pool.alloc(9), at=point.number).place == point.place
        with pytest.raises(AssertionError, match="without being killed"):
            run_and_kill(lambda: pool.alloc(9), at=100_000)


def test_a_stopped_process_stands_until_it_is_continued() -> None:
    ours, theirs = Wire.pair()
    pid = os.fork()
    if pid == 0:
        while True:
            theirs.put(theirs.get())
    try:
        ours.put(b"1")
        assert ours.get(timeout=10) == b"1"
        stop(pid)
        ours.put(b"2")
        with pytest.raises(queue.Empty):
            ours.get(timeout=0.05)
        cont(pid)
        assert ours.get(timeout=10) == b"2"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
        theirs.close()


def test_an_abandoned_pool_leaves_what_a_dead_process_leaves(pool_name: str) -> None:
    with BlockPool.create(pool_name, CONFIG, prefault="off") as pool:
        other = BlockPool.attach(pool_name, prefault="off")
        reserve(other, 9)
        abandon(other)
        assert other.is_closed
        assert pool.stats().dead_participants == 1
        report = pool.reap()
        assert (report.reservations, report.participants) == (1, 1)


def test_what_does_not_survive_is_told(pool_name: str) -> None:
    with BlockPool.create(pool_name, CONFIG, prefault="off") as pool:
        kept = remember(pool, publish(pool, 9, readers=2))
        assert_survives(pool, kept)
        fill(pool, reserve(pool, 9))
        assert_survives(pool, kept)
        words = pool.state.segment.words
        words[H_FREE_BLOCKS] -= 1
        with pytest.raises(AssertionError, match=r"after the death: .*blocks are free"):
            assert_survives(pool, kept)
        words[H_FREE_BLOCKS] += 1
        pool.free(kept.handle)
        with pytest.raises(AssertionError, match="was published, now it is None"):
            assert_survives(pool, kept)


def test_changed_bytes_are_told(pool_name: str) -> None:
    with survivor() as scene:
        pool = scene.pool
        (kept,) = scene.kept
        pool.state.segment.memory[pool.state.layout.fields["x"]] ^= 1
        with pytest.raises(AssertionError, match=r"\['x'\] changed"):
            assert_survives(pool, kept)
        pool.state.segment.memory[pool.state.layout.fields["x"]] ^= 1
        assert_survives(pool, kept)


def test_what_takes_too_long_is_interrupted() -> None:
    with pytest.raises(TooSlowError, match="a long wait"), within(0.02, "a long wait"):
        threading.Event().wait(30)
    with within(30, "a short one"):
        pass


def test_what_takes_too_long_in_another_thread_is_told_when_it_is_over() -> None:
    told: list[BaseException] = []

    def run() -> None:
        try:
            with within(0.001, "a long wait"):
                time.sleep(0.01)
        except TooSlowError as error:
            told.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert len(told) == 1


def test_a_wire_carries_messages_in_order_and_tells_when_it_is_full() -> None:
    ours, theirs = Wire.pair()
    assert not theirs.has_message()
    sent = _fill_up(ours)
    assert sent > 0
    assert [theirs.get_nowait() for _ in range(sent)] == [b"%d" % n for n in range(sent)]
    with pytest.raises(queue.Empty):
        theirs.get_nowait()
    ours.close()
    theirs.close()


def _fill_up(wire: Wire) -> int:
    sent = 0
    try:
        while True:
            wire.put_nowait(b"%d" % sent)
            sent += 1
    except queue.Full:
        return sent


def test_one_that_was_killed_is_no_zombie_of_ours() -> None:
    run_forked(lambda _: die())
    wait_until(_has_no_children, "no child is left")


def _has_no_children() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return True
