"""The states of an allocation: one table, one function.

    reserved    its owner writes (or, as a landing allocation, lets a writer's lease write)
    published   complete; waits for readers
    leased      at least one reader has it open
    draining    given back while leases are open; the last lease released frees it
    settling    given back while a stream of its owner still works on it; free when that is over

What it does not do: touch shared memory, or know who asks.
"""

from __future__ import annotations

import enum

from shmblocks.errors import InvalidStateError


class State(str, enum.Enum):
    """State of an allocation."""

    FREE = "free"
    RESERVED = "reserved"
    PUBLISHED = "published"
    LEASED = "leased"
    DRAINING = "draining"
    SETTLING = "settling"

    __str__ = str.__str__
    # Enum's own is a Python function, and the table is looked up in each operation.
    __hash__ = str.__hash__


class Event(str, enum.Enum):
    """What can happen to an allocation."""

    GROW = "grow"
    PUBLISH = "publish"
    OPEN = "open"
    WRITE = "write"
    RELEASE = "release"
    FREE = "free"
    SETTLE = "settle"

    __str__ = str.__str__
    __hash__ = str.__hash__


# The number of a state in a record. FREE is 0, so that zeroed memory is a pool of free blocks.
STATES = tuple(State)
NUMBER = {state: number for number, state in enumerate(STATES)}

# (state, event) -> (state while leases are open after the event, state when none is).
# An event that is not here is not allowed in that state.
TRANSITIONS: dict[tuple[State, Event], tuple[State, State]] = {
    (State.RESERVED, Event.GROW): (State.RESERVED, State.RESERVED),
    (State.RESERVED, Event.PUBLISH): (State.PUBLISHED, State.PUBLISHED),
    (State.RESERVED, Event.WRITE): (State.RESERVED, State.RESERVED),
    (State.RESERVED, Event.RELEASE): (State.RESERVED, State.RESERVED),
    (State.RESERVED, Event.FREE): (State.DRAINING, State.FREE),
    (State.PUBLISHED, Event.OPEN): (State.LEASED, State.LEASED),
    (State.PUBLISHED, Event.FREE): (State.DRAINING, State.FREE),
    (State.LEASED, Event.OPEN): (State.LEASED, State.LEASED),
    (State.LEASED, Event.RELEASE): (State.LEASED, State.PUBLISHED),
    (State.LEASED, Event.FREE): (State.DRAINING, State.FREE),
    (State.DRAINING, Event.RELEASE): (State.DRAINING, State.FREE),
    (State.SETTLING, Event.SETTLE): (State.SETTLING, State.FREE),
}


# The same by numbers, for the block table: each of its operations asks.
_AFTER: tuple[dict[Event, tuple[int, int]], ...] = tuple(
    {
        event: (NUMBER[with_leases], NUMBER[without])
        for (its_state, event), (with_leases, without) in TRANSITIONS.items()
        if its_state is state
    }
    for state in STATES
)
_FREE = NUMBER[State.FREE]
_PUBLISHED = NUMBER[State.PUBLISHED]
_SETTLING = NUMBER[State.SETTLING]


def transition(
    state: int, event: Event, leases: int, readers_left: int, in_flight: bool = False
) -> int:
    """The state after `event`, given what is open and still expected *after* it; by number.

    `in_flight`: a stream of the owner still works on the blocks, so that they cannot be free yet.
    Raises `InvalidStateError` when the event is not allowed.
    """
    after = _AFTER[state].get(event)
    if after is None:
        allowed = [str(known) for known, its_event in TRANSITIONS if its_event is event]
        raise InvalidStateError(
            f"{event}: expected an allocation that is {' or '.join(allowed)}, this one is "
            f"{STATES[state]}"
        )
    following = after[0] if leases else after[1]
    if following == _PUBLISHED and event is Event.RELEASE and readers_left == 0:
        following = _FREE
    if following == _FREE and in_flight:
        return _SETTLING
    return following
