"""Kill an operation, or interrupt it, at every line that it executes, and look at what is left.

    @contextlib.contextmanager
    def scene():                                  # in the parent, anew for every point
        with BlockPool.create("scene", config, prefault="off") as pool:
            yield pool

    def publishing(pool):                         # in a forked child: gets ready ...
        handle = pool.alloc(100)
        return lambda: pool.publish(handle)       # ... and gives the call that is to be killed

    def verify(pool, point):                      # in the parent, after the child's death
        assert_survives(pool)

    coverage = kill_at_every_line(scene, publishing, verify)
    print(coverage)                               # publishing: killed at 61 of 61 lines

How it works

  1. The operation runs once in a child that only writes down every point it passes.
  2. For n = 1, 2, ... it runs in a new child, which sends SIGKILL to itself at its n-th point, and
     `verify` runs in the parent. That child must have died at the same line as the n-th of step 1.
  3. One more child is to die at the point behind the last. It must come to its end unharmed, or a
     line was passed over. It is dead now too, and is verified.

`interrupt_at_every_line` raises an exception at the point instead, in this very process, which
lives on and verifies.

Most lines only compute: a death before them leaves what a death after them leaves. With
`one_per_state`, step 1 also takes a digest of what would be left at each point (lasting.py), and
step 2 is done at the first point of each digest. That is a fifth of the deaths for the same proof,
where nothing but shared memory and names in /dev/shm outlives the child.

Adapters name their own modules with `scope=Scope([my_module])`. The parent should not have imported
torch: forking a process that has takes ten times as long, and there are thousands of forks.

What it does not do: reach code that other threads run, or places inside of C functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, TypeVar

import msgspec

from shmblocks.testing.deaths import PATIENCE, Ending, Tell, die, run_forked, run_traced
from shmblocks.testing.lasting import lasting_state
from shmblocks.testing.points import Act, Point, Scope, Step, Trace, end_point

S = TypeVar("S")

Setup = Callable[[], AbstractContextManager[S]]
Operation = Callable[[S], Callable[[], object]]
Verify = Callable[[S, Point], None]

# Other processes of the machine may look at the scene's pool (`list_pools` does) and be in the way
# for a moment; that run then has other lines than recorded. It is verified and done once more.
_ATTEMPTS = 5
_LENGTH_BYTES = 4
_BOX_BYTES = 4096


class Coverage(NamedTuple):
    """All points of an operation, and at how many it was killed or interrupted: at all of them, or
    at one for each state that a death can leave."""

    operation: str
    deed: str
    step: Step
    points: tuple[Point, ...]
    done: int

    def __str__(self) -> str:
        all_of_them = f"its {len(self.points)} {self.step}s"
        if self.done == len(self.points):
            return f"{self.operation}: {self.deed} at each of {all_of_them}"
        return f"{self.operation}: {self.deed} at {self.done} of {all_of_them}, one for each state"


def kill_at_every_line(
    setup: Setup[S],
    operation: Operation[S],
    verify: Verify[S],
    *,
    scope: Scope | None = None,
    step: Step = Step.LINE,
    with_fork: bool = False,
    meanwhile: Callable[[S], None] | None = None,
    one_per_state: str | None = None,
    timeout: float = PATIENCE,
) -> Coverage:
    """SIGKILL at every point of an operation, and `verify` after each; see the top of this file.

    setup      gives the scene: entered in the parent for every point anew, and left after `verify`
    operation  called with the scene in a forked child; what it returns is called and killed
    verify     called with the scene and the `Point` in the parent, when the child is dead
    scope      whose lines are points: the library's, if nothing else is said
    step       `Step.OPCODE`: kill at every bytecode instruction
    with_fork  the lines that fork handlers run in the new child are points too
    meanwhile  called with the scene in the parent, every millisecond while the child lives: to
               play the other side
    one_per_state   kill at the first point of each state that a death can leave, and not at those
               that leave the same: a text that is in every name in /dev/shm that the operation
               makes or removes. For operations that leave nothing but these names and shared
               memory, while nobody else works on them: ValueError with `meanwhile` or `with_fork`
    timeout    seconds that one child may take
    """
    if one_per_state is not None and (with_fork or meanwhile is not None):
        raise ValueError(
            "one_per_state: somebody else changes what is left, with `meanwhile` and `with_fork`; "
            "leave it out"
        )
    task = _Task(setup, operation, verify, scope or Scope(), step)
    return _Killing(task, with_fork, meanwhile, one_per_state, timeout).run()


def interrupt_at_every_line(
    setup: Setup[S],
    operation: Operation[S],
    verify: Verify[S],
    *,
    exception: type[BaseException] = KeyboardInterrupt,
    scope: Scope | None = None,
    step: Step = Step.LINE,
) -> Coverage:
    """Raise an exception at every point of an operation, in this process, and `verify` after each.

    The arguments are those of `kill_at_every_line`; nothing is forked. An operation that swallows
    the exception is an AssertionError (but for one that is raised in a `__del__`: it goes to
    `sys.unraisablehook`, which does not tell of it here).
    """
    return _Interrupting(_Task(setup, operation, verify, scope or Scope(), step), exception).run()


@dataclasses.dataclass(frozen=True)
class _Task(Generic[S]):
    """What is to be disturbed: what both ways of doing it have in common."""

    setup: Setup[S]
    operation: Operation[S]
    verify: Verify[S]
    scope: Scope
    step: Step

    @property
    def name(self) -> str:
        return getattr(self.operation, "__name__", repr(self.operation))

    def trace(self, at: int, act: Act) -> Trace:
        return Trace(self.scope, self.step, at, act)


class _EveryPoint(Generic[S]):
    """One operation, and what is done at each of its points."""

    def __init__(self, task: _Task[S], deed: str) -> None:
        self._task = task
        self._deed = deed
        self._name = task.name

    def run(self) -> Coverage:
        with _small_heap():
            points = self._record()
            if not points:
                raise AssertionError(f"{self._name}: runs no line of what is watched")
            chosen = self._choose(points)
            for point in [*chosen, end_point(len(points) + 1)]:
                self._do_at(point.number, point)
        return Coverage(self._name, self._deed, self._task.step, tuple(points), len(chosen))

    def _choose(self, points: list[Point]) -> list[Point]:
        """Those at which it is done."""
        return points

    def _do_at(self, number: int, expected: Point) -> None:
        was_at = expected
        for _ in range(_ATTEMPTS):
            was_at = self._attempt(number)
            if was_at.place == expected.place:
                return
        raise AssertionError(f"{self._name}: expected {expected}, {self._deed} at {was_at}")

    def _record(self) -> list[Point]:
        """Every point of a run that nobody disturbs."""
        raise NotImplementedError

    def _attempt(self, number: int) -> Point:
        """Disturb a run at a point, and verify; which point it was."""
        raise NotImplementedError

    def _verify(self, scene: S, point: Point) -> None:
        try:
            self._task.verify(scene, point)
        except Exception as error:
            what = f"{self._name}, {self._deed} at {point}: {type(error).__name__}: {error}"
            raise AssertionError(what) from error


class _Killing(_EveryPoint[S]):
    """Runs in children, which die."""

    def __init__(
        self,
        task: _Task[S],
        with_fork: bool,
        meanwhile: Callable[[S], None] | None,
        one_per_state: str | None,
        timeout: float,
    ) -> None:
        super().__init__(task, "killed")
        self._with_fork = with_fork
        self._meanwhile = meanwhile
        self._names = one_per_state
        self._timeout = timeout
        self._firsts: list[Point] = []

    def _record(self) -> list[Point]:
        record = _Record(self._names)
        with self._task.setup() as scene:
            ending = self._run(scene, self._task.trace(0, record.add), told=record)
            self._require_success(ending)
        points, self._firsts = msgspec.msgpack.decode(
            ending.told, type=tuple[list[Point], list[Point]]
        )
        return points

    def _choose(self, points: list[Point]) -> list[Point]:
        return points if self._names is None else self._firsts

    def _attempt(self, number: int) -> Point:
        box = _BlackBox()
        with self._task.setup() as scene:
            ending = self._run(scene, self._task.trace(number, box.write_and_die))
            if not ending.was_killed:
                self._require_success(ending)
            point = box.read() if ending.was_killed else end_point(number)
            self._verify(scene, point)
        return point

    def _run(self, scene: S, trace: Trace, told: _Record | None = None) -> Ending:
        def body(tell: Tell) -> None:
            run_traced(self._task.operation(scene), trace)
            if told is not None:
                tell(msgspec.msgpack.encode((told.points, told.firsts)))

        if self._with_fork:
            # What earlier scenes left in reference cycles has fork handlers too, in any order.
            gc.collect()
        born_under = trace if self._with_fork else None
        play = self._meanwhile
        meanwhile = None if play is None else functools.partial(play, scene)
        return run_forked(body, timeout=self._timeout, trace=born_under, meanwhile=meanwhile)

    def _require_success(self, ending: Ending) -> None:
        if ending.exit_code != 0:
            told = ending.told.decode(errors="replace")
            raise AssertionError(f"{self._name}: ended with {ending.exit_code}: {told}")


class _Record:
    """The points of a run that nobody disturbs, and the first of each state that they would leave
    (none, where `names` is None)."""

    def __init__(self, names: str | None) -> None:
        self._names = names
        self._seen: set[bytes] = set()
        self.points: list[Point] = []
        self.firsts: list[Point] = []

    def add(self, point: Point) -> None:
        self.points.append(point)
        if self._names is not None:
            state = lasting_state(self._names)
            if state not in self._seen:
                self._seen.add(state)
                self.firsts.append(point)


class _BlackBox:
    """Where a process writes down where it dies: memory that its parent shares."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BOX_BYTES)

    def write_and_die(self, point: Point) -> None:
        data = msgspec.msgpack.encode(point)
        self._memory.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        die()

    def read(self) -> Point:
        length = int.from_bytes(self._memory[:_LENGTH_BYTES], "little")
        data = self._memory[_LENGTH_BYTES : _LENGTH_BYTES + length]
        return msgspec.msgpack.decode(data, type=Point)


class _Interrupting(_EveryPoint[S]):
    """Runs here, and an exception comes up."""

    def __init__(self, task: _Task[S], exception: type[BaseException]) -> None:
        super().__init__(task, f"{exception.__name__} raised")
        self._exception = exception

    def _record(self) -> list[Point]:
        points: list[Point] = []
        with self._task.setup() as scene:
            run_traced(self._task.operation(scene), self._task.trace(0, points.append))
            gc.collect()
        return points

    def _attempt(self, number: int) -> Point:
        raised = self._exception(f"point {number}")
        with self._task.setup() as scene:
            trace = self._task.trace(number, _raiser(raised))
            came_out, result = self._run(scene, trace, raised)
            point = trace.fired or end_point(number)
            if trace.fired and not came_out and not trace.was_in_finalizer:
                raise AssertionError(f"{self._name}: swallowed {raised!r} at {point}")
            self._verify(scene, point)
            del result  # kept until here: a lease that is dropped is given back
            gc.collect()
        return point

    def _run(self, scene: S, trace: Trace, raised: BaseException) -> tuple[bool, object]:
        """Whether the exception came out of the operation, and what that returned otherwise.

        Nothing of its frames is kept alive.
        """
        result: object = None
        came_out = False
        try:
            with _not_told_by_finalizers(raised):
                result = run_traced(self._task.operation(scene), trace)
        except BaseException as error:
            if error is not raised:
                raise
            came_out = True
        _forget_frames(raised)
        # Raised at the end of a `with` block that an exception leaves, where no signal could raise
        # it, it makes CPython go on handling that other exception.
        _forget_frames(sys.exc_info()[1])
        gc.collect()
        return came_out, result


@contextlib.contextmanager
def _not_told_by_finalizers(raised: BaseException) -> Iterator[None]:
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_value is not raised:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _raiser(exception: BaseException) -> Act:
    def act(_: Point) -> None:
        raise exception

    return act


def _forget_frames(error: BaseException | None) -> None:
    """Let go of everything that the frames of an exception, and of those behind it, keep alive."""
    while error is not None:
        behind = error.__context__
        error.__traceback__ = error.__context__ = None
        error = behind


@contextlib.contextmanager
def _small_heap() -> Iterator[None]:
    """Keep the collector off what is there already: touching it would copy it in each child."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
