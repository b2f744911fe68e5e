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

`interrupt_at_every_line` raises an exception at the point instead, in a process that lives on:
`verify` runs there, in the child.

Adapters name their own modules with `watch=`. The parent should not have imported torch: forking a
process that has takes ten times as long, and there are thousands of forks.

What it does not do: reach code that other threads run, or places inside of C functions.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

import msgspec

from shmblocks.testing.deaths import PATIENCE, Ending, Tell, die, run_forked, run_traced
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
    """At how many points an operation was killed or interrupted; they are all that it has."""

    operation: str
    deed: str
    step: Step
    points: tuple[Point, ...]

    def __str__(self) -> str:
        return f"{self.operation}: {self.deed} at each of its {len(self.points)} {self.step}s"


def kill_at_every_line(
    setup: Setup[S],
    operation: Operation[S],
    verify: Verify[S],
    *,
    watch: Iterable[ModuleType | str] = (),
    step: Step = Step.LINE,
    with_fork: bool = False,
    timeout: float = PATIENCE,
) -> Coverage:
    """SIGKILL at every point of an operation, and `verify` after each; see the top of this file.

    setup      gives the scene: entered in the parent for every point anew, and left after `verify`
    operation  called with the scene in a forked child; what it returns is called and killed
    verify     called with the scene and the `Point` in the parent, when the child is dead
    watch      modules or paths whose lines are points too
    step       `Step.OPCODE`: kill at every bytecode instruction
    with_fork  the lines that fork handlers run in the new child are points too
    timeout    seconds that one child may take
    """
    return _Harness(setup, operation, Scope(watch), step, with_fork, timeout).kill(verify)


def interrupt_at_every_line(
    setup: Setup[S],
    operation: Operation[S],
    verify: Verify[S],
    *,
    exception: type[BaseException] = KeyboardInterrupt,
    watch: Iterable[ModuleType | str] = (),
    step: Step = Step.LINE,
    timeout: float = PATIENCE,
) -> Coverage:
    """Raise an exception at every point of an operation; `verify` in the process that lives on.

    The arguments are those of `kill_at_every_line`, but for `verify`: it runs in the forked child
    in which the exception came up. An operation that swallows it is an AssertionError.
    """
    harness = _Harness(setup, operation, Scope(watch), step, False, timeout)
    return harness.interrupt(verify, exception)


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


class _Harness(Generic[S]):
    """One operation and how its points are found."""

    def __init__(
        self,
        setup: Setup[S],
        operation: Operation[S],
        scope: Scope,
        step: Step,
        with_fork: bool,
        timeout: float,
    ) -> None:
        self._setup = setup
        self._operation = operation
        self._scope = scope
        self._step = step
        self._with_fork = with_fork
        self._timeout = timeout
        self._name: str = getattr(operation, "__name__", repr(operation))

    # ---- killing -----------------------------------------------------------------------------

    def kill(self, verify: Verify[S]) -> Coverage:
        with _small_forks():
            points = self._record()
            for number, expected in enumerate(points, 1):
                self._kill_at(verify, number, expected)
            self._unharmed(verify, len(points) + 1)
        return Coverage(self._name, "killed", self._step, tuple(points))

    def _kill_at(self, verify: Verify[S], number: int, expected: Point) -> None:
        died_at = expected
        for _ in range(_ATTEMPTS):
            with self._setup() as scene:
                died_at = self._killed(scene, number)
                self._verify(verify, scene, died_at, "killed")
            if died_at.place == expected.place:
                return
        raise AssertionError(f"{self._name}: expected {expected}, died at {died_at}")

    def _killed(self, scene: S, number: int) -> Point:
        box = _BlackBox()
        ending = self._run(scene, number, box.write_and_die)
        if not ending.was_killed:
            raise AssertionError(f"{self._name}: not killed at point {number}: {_words(ending)}")
        return box.read()

    def _unharmed(self, verify: Verify[S], number: int) -> None:
        """The run whose point would lie behind the last one must come to its end, and then dies."""
        box = _BlackBox()
        for _ in range(_ATTEMPTS):
            with self._setup() as scene:
                ending = self._run(scene, number, box.write_and_die)
                if not ending.was_killed:
                    self._require_success(ending)
                self._verify(verify, scene, end_point(number), "killed")
            if not ending.was_killed:
                return
        raise AssertionError(f"{self._name}: has a point more than recorded: {box.read()}")

    # ---- interrupting ------------------------------------------------------------------------

    def interrupt(self, verify: Verify[S], exception: type[BaseException]) -> Coverage:
        with _small_forks():
            points = self._record()
            for number, expected in enumerate([*points, end_point(len(points) + 1)], 1):
                self._interrupt_at(verify, exception, number, expected)
        return Coverage(self._name, f"{exception.__name__} raised", self._step, tuple(points))

    def _interrupt_at(
        self, verify: Verify[S], exception: type[BaseException], number: int, expected: Point
    ) -> None:
        was_at = expected
        for _ in range(_ATTEMPTS):
            with self._setup() as scene:
                was_at = self._interrupted(scene, number, verify, exception)
            if was_at.place == expected.place:
                return
        raise AssertionError(f"{self._name}: expected {expected}, was at {was_at}")

    def _interrupted(
        self, scene: S, number: int, verify: Verify[S], exception: type[BaseException]
    ) -> Point:
        raised = exception(f"point {number}")

        def body(tell: Tell) -> None:
            trace = Trace(self._scope, self._step, number, _raiser(raised))
            came_out, result = self._run_interrupted(scene, trace, raised)
            point = trace.fired or end_point(number)
            if trace.fired and not came_out:
                raise AssertionError(f"{self._name}: swallowed {raised!r} at {point}")
            self._verify(verify, scene, point, f"{exception.__name__} raised")
            tell(msgspec.msgpack.encode(point))
            del result  # kept until here: a lease that is dropped is given back

        ending = run_forked(body, timeout=self._timeout)
        self._require_success(ending)
        return msgspec.msgpack.decode(ending.told, type=Point)

    def _run_interrupted(
        self, scene: S, trace: Trace, raised: BaseException
    ) -> tuple[bool, object]:
        """Whether the exception came out of the operation, and what that returned otherwise.

        Nothing of its frames is kept alive.
        """
        result: object = None
        came_out = False
        try:
            result = run_traced(self._operation(scene), trace)
        except BaseException as error:
            if error is not raised:
                raise
            came_out = True
        _forget_frames(raised)
        # Raised at the end of a `with` block that an exception leaves, where no signal could raise
        # it, it makes CPython go on handling that other exception.
        _forget_frames(sys.exc_info()[1])
        gc.enable()
        gc.collect()
        return came_out, result

    # ---- both --------------------------------------------------------------------------------

    def _record(self) -> list[Point]:
        """Every point of a run that nobody disturbs."""
        points: list[Point] = []
        with self._setup() as scene:
            ending = self._run(scene, 0, points.append, tells=points)
            self._require_success(ending)
        recorded = msgspec.msgpack.decode(ending.told, type=list[Point])
        if not recorded:
            raise AssertionError(f"{self._name}: runs no line of what is watched")
        return recorded

    def _run(self, scene: S, at: int, act: Act, tells: list[Point] | None = None) -> Ending:
        trace = Trace(self._scope, self._step, at, act)

        def body(tell: Tell) -> None:
            run_traced(self._operation(scene), trace)
            if tells is not None:
                tell(msgspec.msgpack.encode(tells))

        born_under = trace if self._with_fork else None
        if self._with_fork:
            # What earlier scenes left in reference cycles has fork handlers too, in any order.
            gc.collect()
        return run_forked(body, timeout=self._timeout, trace=born_under)

    def _require_success(self, ending: Ending) -> None:
        if ending.exit_code != 0:
            raise AssertionError(f"{self._name}: {_words(ending)}")

    def _verify(self, verify: Verify[S], scene: S, point: Point, deed: str) -> None:
        try:
            verify(scene, point)
        except Exception as error:
            what = f"{self._name}, {deed} at {point}: {type(error).__name__}: {error}"
            raise AssertionError(what) from error


def _forget_frames(error: BaseException | None) -> None:
    """Let go of everything that the frames of an exception, and of those behind it, keep alive."""
    while error is not None:
        behind = error.__context__
        error.__traceback__ = error.__context__ = None
        error = behind


@contextlib.contextmanager
def _small_forks() -> Iterator[None]:
    """Keep the collector off what is there already: touching it would copy it in each child."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _raiser(exception: BaseException) -> Act:
    def act(_: Point) -> None:
        raise exception

    return act


def _words(ending: Ending) -> str:
    return f"the child ended with {ending.exit_code}: {ending.told.decode(errors='replace')}"
