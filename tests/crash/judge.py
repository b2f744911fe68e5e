"""What must be true after each death and each interruption.

`kill` and `interrupt` run one case of `operations.py` at every line that it has. They are called in
a fresh interpreter, away from pytest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import msgspec

from shmblocks import BlockPool
from shmblocks.testing import (
    Coverage,
    Point,
    Scope,
    Step,
    assert_accounted_for,
    assert_clean,
    assert_nothing_left,
    assert_survives,
    assert_unchanged,
    interrupt_at_every_line,
    kill_at_every_line,
    remember,
    run_forked,
    within,
)
from shmblocks.testing.deaths import run_traced
from shmblocks.testing.points import Trace
from tests.crash.operations import CASES, Case
from tests.crash.scenes import CONFIG, Allocation, Scene, picture, reserve, survivor
from tests.support.points import one_per_state

Pictures = tuple[list[Allocation], list[Allocation]]


def kill(name: str, step: Step = Step.LINE) -> Coverage:
    """Kill a case at every line."""
    case = CASES[name]
    pictures = before_and_after(case) if case.once else None

    def verify(scene: Scene, point: Point) -> None:
        if scene.has_survivor:
            _judge_death(scene, point, pictures)
        else:
            _judge_name(scene)

    return kill_at_every_line(
        case.setup,
        case.operation,
        verify,
        step=step,
        with_fork=case.with_fork,
        one_per_state=None if case.with_fork else one_per_state(),
    )


def before_and_after(case: Case) -> Pictures:
    """The allocations before and after a run that nobody disturbs."""
    with case.setup() as scene:

        def body(tell: Callable[[bytes], None]) -> None:
            call = case.operation(scene)
            tell(msgspec.msgpack.encode(picture(scene.pool)))
            call()

        ending = run_forked(body)
        assert ending.exit_code == 0, ending
        before = msgspec.msgpack.decode(ending.told, type=list[Allocation])
        return before, picture(scene.pool)


def _judge_death(scene: Scene, point: Point, pictures: Pictures | None) -> None:
    if pictures is not None:
        with within(1.0, "the survivor's next operation"):
            _assert_done_or_not(picture(scene.pool), point, pictures)
    assert_survives(scene.pool, *scene.kept)
    _assert_mine_unchanged(scene)
    assert scene.pool.stats().waiters == 0, "somebody is in the wait queue who does not wait"


def _assert_done_or_not(now: list[Allocation], point: Point, pictures: Pictures) -> None:
    allowed = pictures[1:] if point.is_end else pictures
    assert now in allowed, f"{now} is neither what was before nor what comes after: {allowed}"


def _assert_mine_unchanged(scene: Scene) -> None:
    """What the survivor holds is still there, with its bytes."""
    held = {info.generation: str(info.state) for info in scene.pool.allocations()}
    for remembered in scene.mine:
        assert held.get(remembered.handle.generation) == "reserved", (remembered.handle, held)
        assert remember(scene.pool, remembered.handle) == remembered


def _judge_name(scene: Scene) -> None:
    """Nobody lives: the name can be used at once, and nothing stays."""
    with within(1.0, "creating anew"):
        pool = BlockPool.create(scene.name, CONFIG, prefault="off")
    with pool:
        reserve(pool, 9)
        assert_survives(pool)
    assert_nothing_left(scene.name)


# ---- interrupts ------------------------------------------------------------------------------


def interrupt(name: str, exception: type[BaseException]) -> Coverage:
    """Interrupt a case at every line."""
    case = CASES[name]
    pictures = before_and_after(case) if case.whole else None
    descriptors: list[set[str]] = []

    def operation(scene: Scene) -> Callable[[], object]:
        call = case.operation(scene)
        descriptors.append(_descriptors())
        return call

    operation.__name__ = case.name

    def verify(scene: Scene, point: Point) -> None:
        if not point.is_end and not case.maps:
            _assert_none_left_open(descriptors[-1])
        if scene.has_survivor:
            _judge_interrupt(case, scene, point, pictures)
            if not point.is_end:
                _assert_none_left_open(descriptors[-1])
        elif not (point.is_end and name.startswith(("create", "ensure"))):
            _judge_name(scene)

    return interrupt_at_every_line(case.setup, operation, verify, exception=exception)


def _assert_none_left_open(before: set[str]) -> None:
    left = _descriptors() - before
    assert not left, f"left open: {left}"


def _descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue
    return found


def _judge_interrupt(case: Case, scene: Scene, point: Point, pictures: Pictures | None) -> None:
    """The process lives on. The witness proves that the lock is free for others."""
    witness = scene.witness
    assert witness.stats().waiters == 0, "somebody is in the wait queue who does not wait"
    with within(1.0, "another participant's next operation"):
        witness.available_blocks()
    if pictures is not None:
        _judge_outcome(case, picture(witness), point, pictures)
    assert_survives(witness, *scene.kept)
    if not point.is_end:
        living = 1 + (not scene.pool.is_closed)
        assert witness.stats().participants == living, witness.participants()
    if not scene.pool.is_closed:
        _assert_mine_unchanged(scene)
        _judge_interrupted(scene.pool)
    assert_accounted_for(witness)
    assert_clean(witness, "after all")
    for remembered in scene.kept:
        assert_unchanged(witness, remembered)


def interrupt_first_use_after_fork() -> int:
    """Interrupt the first call of a forked child, which joins, at every line; how many it has."""
    lines = 0
    while True:
        with survivor() as scene:
            ending = run_forked(functools.partial(_join_interrupted, scene, lines + 1))
            assert ending.exit_code == 0, ending.told.decode()
            assert_survives(scene.pool, *scene.kept)
        if ending.told == b"over":
            return lines
        lines += 1


def _join_interrupted(scene: Scene, at: int, tell: Callable[[bytes], None]) -> None:
    interrupt = KeyboardInterrupt()

    def act(_: Point) -> None:
        raise interrupt

    try:
        run_traced(scene.pool.available_blocks, Trace(Scope(), Step.LINE, at, act))
    except KeyboardInterrupt:
        pass
    else:
        tell(b"over")
    with within(1.0, "the next operation of the one who was interrupted"):
        reserve(scene.pool, 4)
    assert_clean(scene.pool, "after a join that was interrupted")
    alive = [info.slot for info in scene.pool.participants() if info.is_alive]
    # The parent is two of them; the child must not be two more.
    assert len(alive) == 3, scene.pool.participants()


def _judge_outcome(case: Case, now: list[Allocation], point: Point, pictures: Pictures) -> None:
    if case.undone and not point.is_end:
        assert now == pictures[0], f"not given back: {now}, before: {pictures[0]}"
    else:
        _assert_done_or_not(now, point, pictures)


def _judge_interrupted(pool: BlockPool) -> None:
    """The one that was interrupted goes on as if nothing had been."""
    with within(1.0, "the next operation of the one who was interrupted"):
        pool.free(reserve(pool, 4))
    assert_clean(pool, "seen by the one who was interrupted")
    assert_accounted_for(pool)
    pool.close()
