"""All or nothing, whatever store the writer is killed before or after, again and again.

The journal runs on plain memory here, behind a `Tape` that lets a set number of stores through and
then raises: what a process leaves that was killed at that instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmblocks import DamagedPoolError
from shmblocks._state.journal import Journal, Store

SIZE = 1024
JOURNAL = 256
JOURNAL_BYTES = 256
STATE_BYTES = 768


class KilledError(Exception):
    """Stands for SIGKILL."""


class Tape:
    """Memory that can be written to `budget` times."""

    def __init__(self, memory: bytearray, budget: int) -> None:
        self._view = memoryview(memory)
        self._words = self._view.cast("Q")
        self.budget = budget

    def spend(self) -> None:
        if self.budget == 0:
            raise KilledError
        self.budget -= 1


@dataclass(frozen=True)
class Bytes:
    """The tape as `Journal` uses its bytes."""

    tape: Tape

    def __setitem__(self, where: slice, data: bytes) -> None:
        self.tape.spend()
        self.tape._view[where] = data

    def __getitem__(self, where: slice) -> memoryview:
        return self.tape._view[where]


@dataclass(frozen=True)
class Words:
    """The tape as `Journal` uses its words."""

    tape: Tape

    def __setitem__(self, where: int, value: int) -> None:
        self.tape.spend()
        self.tape._words[where] = value

    def __getitem__(self, where: int) -> int:
        value: int = self.tape._words[where]
        return value


def journal_on(memory: bytearray, budget: int = -1) -> Journal:
    tape = Tape(memory, budget)
    return Journal(
        cast("memoryview", Bytes(tape)),
        cast("memoryview", Words(tape)),
        JOURNAL,
        JOURNAL_BYTES,
        STATE_BYTES,
    )


def recover(memory: bytearray) -> None:
    """What the next holder of the lock does."""
    journal = journal_on(memory)
    if Words(Tape(memory, -1))[journal.head]:
        journal.replay()


def outside_of_journal(memory: bytearray) -> bytes:
    return bytes(memory[:JOURNAL] + memory[JOURNAL + JOURNAL_BYTES :])


def is_open(memory: bytearray) -> bool:
    return any(memory[JOURNAL : JOURNAL + 8])


places = st.integers(0, JOURNAL // 8 - 1) | st.integers(
    (JOURNAL + JOURNAL_BYTES) // 8, STATE_BYTES // 8 - 1
)


@st.composite
def changes(draw: st.DrawFn) -> list[Store]:
    """Stores of whole words outside of the journal; they may overlap."""
    stores: list[Store] = []
    for place in draw(st.lists(places, min_size=1, max_size=4)):
        end = JOURNAL // 8 if place < JOURNAL // 8 else STATE_BYTES // 8
        words = draw(st.integers(1, min(3, end - place)))
        stores.append((place * 8, draw(st.binary(min_size=words * 8, max_size=words * 8))))
    return stores


contents = st.binary(min_size=SIZE, max_size=SIZE).map(
    lambda data: bytearray(data[:JOURNAL] + bytes(8) + data[JOURNAL + 8 :])
)


def applied(memory: bytearray, stores: list[Store]) -> bytes:
    after = bytearray(memory)
    for offset, data in stores:
        after[offset : offset + len(data)] = data
    return outside_of_journal(after)


@given(contents, changes())
def test_a_commit_makes_every_store_and_closes_the_journal(
    memory: bytearray, stores: list[Store]
) -> None:
    after = applied(memory, stores)
    journal_on(memory).commit(stores)
    assert outside_of_journal(memory) == after
    assert not is_open(memory)


@given(contents, changes())
def test_killed_at_any_store_the_change_happens_wholly_or_not_at_all(
    memory: bytearray, stores: list[Store]
) -> None:
    before, after = outside_of_journal(memory), applied(memory, stores)
    seen = []
    for budget in range(len(stores) + 3):
        victim = bytearray(memory)
        with pytest.raises(KilledError):
            journal_on(victim, budget).commit(stores)
        seen.append(recovered_however_often_killed(victim))
    # The log alone changes nothing; from the word that commits on, everything has happened.
    assert seen == [before, before] + [after] * (len(stores) + 1)
    journal_on(memory, len(stores) + 3).commit(stores)  # there was no store more


def recovered_however_often_killed(memory: bytearray) -> bytes:
    """What recovery makes of it, when recovery itself is killed at each of its stores in turn."""
    budget = 0
    while is_open(memory):
        try:
            journal_on(memory, budget).replay()
        except KilledError:
            budget += 1
    once = bytearray(memory)
    recover(once)
    assert once == memory, "a recovery with nothing to do changed something"
    return outside_of_journal(memory)


def test_a_change_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    memory = bytearray(SIZE)
    with pytest.raises(DamagedPoolError, match="does not fit the journal of 248 bytes"):
        journal_on(memory).commit([(0, bytes(240))])
    assert memory == bytes(SIZE)
    journal_on(memory).commit([(0, b"x" * 232)])  # with its head of 16 bytes: exactly full


@pytest.mark.parametrize(
    ("log", "claimed", "why"),
    [
        (b"", 249, "claims 249 bytes of 248"),
        (b"", 2**64 - 1, "claims 18446744073709551615 bytes"),
        (bytes(8), 8, "an entry is cut off"),
        (b"\0" * 8 + b"\x10" + b"\0" * 7 + b"x" * 8, 24, "an entry of 16 bytes at 0 leaves"),
        (b"\xff" * 8 + b"\x08" + b"\0" * 7 + b"x" * 8, 24, "leaves the state"),
        (b"\xf9\x02" + b"\0" * 6 + b"\x08" + b"\0" * 7 + b"x" * 8, 24, "at 761 leaves"),
        (b"\0" * 8 + b"\xff" * 8, 16, "leaves the state"),
    ],
)
def test_a_damaged_journal_is_told_and_nothing_is_stored(
    log: bytes, claimed: int, why: str
) -> None:
    memory = bytearray(SIZE)
    memory[JOURNAL : JOURNAL + 8] = claimed.to_bytes(8, "little")
    memory[JOURNAL + 8 : JOURNAL + 8 + len(log)] = log
    before = bytes(memory)
    with pytest.raises(DamagedPoolError, match=f"journal is damaged .*{why}"):
        recover(memory)
    assert memory == before


def test_a_good_entry_before_a_damaged_one_is_not_stored() -> None:
    memory = bytearray(SIZE)
    good = b"\0" * 8 + b"\x08" + b"\0" * 7 + b"x" * 8
    memory[JOURNAL : JOURNAL + 8] = (32).to_bytes(8, "little")
    memory[JOURNAL + 8 : JOURNAL + 8 + len(good)] = good
    with pytest.raises(DamagedPoolError, match="cut off"):
        recover(memory)
    assert memory[:8] == bytes(8)


@given(st.binary(max_size=JOURNAL_BYTES - 8), st.integers(0, 2**64 - 1) | st.integers(0, 256))
def test_any_bytes_in_the_journal_are_replayed_inside_the_state_or_told(
    log: bytes, claimed: int
) -> None:
    memory = bytearray(SIZE)
    memory[JOURNAL : JOURNAL + 8] = claimed.to_bytes(8, "little")
    memory[JOURNAL + 8 : JOURNAL + 8 + len(log)] = log
    try:
        recover(memory)
    except DamagedPoolError:
        return
    assert not is_open(memory)
    assert memory[STATE_BYTES:] == bytes(SIZE - STATE_BYTES)
