"""Running a piece of a test inside a transaction, as a method of the state would."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

from shmblocks._state.mutex import transaction
from shmblocks._state.shared_segment import SharedSegment

P = ParamSpec("P")
T = TypeVar("T")


class HasState(Protocol):
    """A pool or a queue."""

    @property
    def state(self) -> SharedSegment: ...


def run_inside(owner: HasState, body: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`body(*args)` under the lock of the owner's segment."""

    @transaction
    def run(state: SharedSegment) -> T:
        return body(*args, **kwargs)

    return run(owner.state)
