"""The points at which an operation can be killed or interrupted: the lines that it executes.

Contract
- A *point* is the moment before a line of watched code runs (or, with `Step.OPCODE`, before one
  bytecode instruction does). Points are numbered from 1 in the order in which they are reached.
- Watched are the files of `shmblocks` (this harness left out) and whatever else the caller names.
- The trace that counts calls `act` at one of them and from then on only counts.

It rests on `sys.settrace`, which sees every line of Python of one thread. What it does not do: see
other threads, or the inside of a function written in C, which is one point however long it takes.
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import shmblocks

Act = Callable[["Point"], None]


class Step(str, enum.Enum):
    """How finely points are laid."""

    LINE = "line"
    OPCODE = "opcode"

    __str__ = str.__str__


class Point(NamedTuple):
    """A moment of an operation: before the given line. `offset` is the instruction's, in bytes."""

    number: int
    file: str
    line: int
    function: str
    offset: int

    @property
    def is_end(self) -> bool:
        """Whether it is the moment after the last line."""
        return not self.file

    @property
    def place(self) -> tuple[str, int, str, int]:
        """All but the number: what must be the same in every run."""
        return (self.file, self.line, self.function, self.offset)

    def __str__(self) -> str:
        if self.is_end:
            return f"point {self.number} (after the last line)"
        return f"point {self.number} ({Path(self.file).name}:{self.line} in {self.function})"


def end_point(number: int) -> Point:
    """The moment after the last line."""
    return Point(number, "", 0, "", 0)


class Scope:
    """Which code is watched: the library, and the modules and files that a caller adds.

    With `library=False` only these: for steps between operations that are killed by themselves.
    """

    def __init__(self, watch: Iterable[ModuleType | str] = (), *, library: bool = True) -> None:
        package = os.path.dirname(shmblocks.__file__) + os.sep
        self._inside = (*([package] if library else []), *map(_prefix, watch))
        self._outside = os.path.dirname(__file__) + os.sep
        self._known: dict[CodeType, bool] = {}

    def covers(self, code: CodeType) -> bool:
        """Whether a function's lines are points."""
        known = self._known.get(code)
        if known is None:
            file = code.co_filename
            known = file.startswith(self._inside) and not file.startswith(self._outside)
            self._known[code] = known
        return known


def _prefix(watched: ModuleType | str) -> str:
    """A module's file; a package's folder; a path as it is."""
    if isinstance(watched, str):
        return watched
    if not watched.__file__:
        raise ValueError(f"watch: expected a module that has a file, got {watched.__name__}")
    folder, file = os.path.split(watched.__file__)
    return folder + os.sep if file == "__init__.py" else watched.__file__


class Trace:
    """Counts points in the calling thread between `start` and `stop`, and acts at one of them."""

    def __init__(self, scope: Scope, step: Step, at: int = 0, act: Act | None = None) -> None:
        """`at` 0: act at every point. `act` may raise: the exception comes up at that point."""
        self._scope = scope
        self._step = step
        self._at = at
        self._act = act
        self._spared = 0
        self._before = sys.gettrace()
        self.count = 0
        self.fired: Point | None = None
        # Whether it acted inside a `__del__`, out of which CPython lets no exception come.
        self.was_in_finalizer = False

    def spare(self, pid: int) -> None:
        """Do nothing in that process: for a trace that is started before a fork."""
        self._spared = pid

    def start(self) -> None:
        """Trace from now on, in place of whatever traced before (a debugger, a coverage tool)."""
        self._before = sys.gettrace()
        sys.settrace(self._enter)

    def stop(self) -> None:
        """Trace no more."""
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:  # noqa: ANN401
        if not self._scope.covers(frame.f_code) or os.getpid() == self._spared:
            return None
        if self._step is Step.OPCODE:
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        return self._look

    def _look(self, frame: FrameType, event: str, _: Any) -> Any:  # noqa: ANN401
        if event == self._step:
            self.count += 1
            if self._act is not None and self._at in (0, self.count):
                self.fired = self._point(frame)
                self.was_in_finalizer = _is_in_finalizer(frame)
                self._act(self.fired)
        return self._look

    def _point(self, frame: FrameType) -> Point:
        code = frame.f_code
        offset = frame.f_lasti if self._step is Step.OPCODE else 0
        return Point(self.count, code.co_filename, frame.f_lineno or 0, code.co_name, offset)


def _is_in_finalizer(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None
