"""Every state with every event: what is in the table moves, everything else is refused."""

from __future__ import annotations

import itertools

import pytest

from shmblocks import InvalidStateError, State
from shmblocks._state.states import NUMBER, STATES, TRANSITIONS, Event, transition

ALLOWED = {
    (State.RESERVED, Event.GROW),
    (State.RESERVED, Event.PUBLISH),
    (State.RESERVED, Event.WRITE),
    (State.RESERVED, Event.RELEASE),
    (State.RESERVED, Event.FREE),
    (State.PUBLISHED, Event.OPEN),
    (State.PUBLISHED, Event.FREE),
    (State.LEASED, Event.OPEN),
    (State.LEASED, Event.RELEASE),
    (State.LEASED, Event.FREE),
    (State.DRAINING, Event.RELEASE),
    (State.SETTLING, Event.SETTLE),
}


def test_the_table_allows_exactly_what_is_allowed() -> None:
    assert set(TRANSITIONS) == ALLOWED


@pytest.mark.parametrize("state", State)
def test_an_event_is_in_the_table_or_refused_with_the_states_that_allow_it(state: State) -> None:
    for event in Event:
        if (state, event) in TRANSITIONS:
            continue
        with pytest.raises(InvalidStateError, match=f"{event}: expected .* this one is {state}"):
            transition(NUMBER[state], event, 0, 1)


def test_nothing_happens_to_what_is_free() -> None:
    # By identity: as strings, the state "free" and the event "free" are equal.
    assert not [state for state, _ in TRANSITIONS if state is State.FREE]


@pytest.mark.parametrize(
    ("state", "event", "leases", "readers_left", "after"),
    [
        # A reservation: no lease is a reader's.
        (State.RESERVED, Event.GROW, 0, 0, State.RESERVED),
        (State.RESERVED, Event.WRITE, 1, 0, State.RESERVED),
        (State.RESERVED, Event.RELEASE, 1, 0, State.RESERVED),
        (State.RESERVED, Event.RELEASE, 0, 0, State.RESERVED),
        (State.RESERVED, Event.PUBLISH, 0, 3, State.PUBLISHED),
        (State.RESERVED, Event.FREE, 0, 0, State.FREE),
        (State.RESERVED, Event.FREE, 1, 0, State.DRAINING),
        # Published: it lives until the last expected reader has gone.
        (State.PUBLISHED, Event.OPEN, 1, 0, State.LEASED),
        (State.PUBLISHED, Event.OPEN, 1, 2, State.LEASED),
        (State.PUBLISHED, Event.FREE, 0, 0, State.FREE),
        (State.LEASED, Event.OPEN, 2, 0, State.LEASED),
        (State.LEASED, Event.RELEASE, 1, 0, State.LEASED),
        (State.LEASED, Event.RELEASE, 1, 1, State.LEASED),
        (State.LEASED, Event.RELEASE, 0, 1, State.PUBLISHED),
        (State.LEASED, Event.RELEASE, 0, 0, State.FREE),
        (State.LEASED, Event.FREE, 1, 0, State.DRAINING),
        # Draining: only the leases keep it.
        (State.DRAINING, Event.RELEASE, 1, 0, State.DRAINING),
        (State.DRAINING, Event.RELEASE, 0, 0, State.FREE),
        # Settling: only a stream of its owner keeps it.
        (State.SETTLING, Event.SETTLE, 0, 0, State.FREE),
    ],
)
def test_an_event_leads_where_the_leases_and_readers_to_come_say(
    state: State, event: Event, leases: int, readers_left: int, after: State
) -> None:
    assert STATES[transition(NUMBER[state], event, leases, readers_left)] is after


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (State.RESERVED, Event.FREE),
        (State.PUBLISHED, Event.FREE),
        (State.LEASED, Event.FREE),
        (State.LEASED, Event.RELEASE),
        (State.DRAINING, Event.RELEASE),
    ],
)
def test_what_a_stream_of_its_owner_works_on_settles_before_it_is_free(
    state: State, event: Event
) -> None:
    assert STATES[transition(NUMBER[state], event, 0, 0, in_flight=True)] is State.SETTLING
    # While leases are open it is theirs first.
    with_leases = transition(NUMBER[state], event, 1, 0, in_flight=True)
    assert STATES[with_leases] in (State.DRAINING, State.LEASED)


def test_every_state_but_free_can_be_reached_and_left() -> None:
    # Settling is entered in place of free.
    entered = {*itertools.chain.from_iterable(TRANSITIONS.values())}
    assert entered == set(State)
    assert {state for state, _ in TRANSITIONS} == {*State} - {State.FREE}


def test_zeroed_memory_is_free_and_numbers_are_never_reassigned() -> None:
    # They stand in segments that another version of the library may have made.
    assert [NUMBER[state] for state in State] == [0, 1, 2, 3, 4, 5]
    assert STATES == (
        State.FREE, State.RESERVED, State.PUBLISHED, State.LEASED, State.DRAINING, State.SETTLING,
    )  # fmt: skip
