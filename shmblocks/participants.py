"""Who is attached, proved by the kernel.

Contract
- A participant is one attached process. It holds a file lock on the byte of its place for as long
  as it lives; no process table, pid or heartbeat is asked.
- A place is used again after its holder left or died, under a new incarnation number. A participant
  is known by both, so that what the dead one held is never taken for the newcomer's.
- A place whose record is filled and whose byte is not locked belongs to a dead participant.

Joining, in steps (all under the pool's lock):

  1. lock the byte of a place whose record is empty;
  2. fill the record, through the journal.

Killed between the two: the byte falls, the record is empty, the place is free.

What it does not do: give back what the dead held (`reclaim.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from shmblocks.errors import TooManyParticipantsError
from shmblocks.filelock import PLACE_BYTE, PLACE_BYTES, FileLocks
from shmblocks.journal import Journal
from shmblocks.layout import (
    H_NEXT_INCARNATION,
    PARTICIPANT,
    PARTICIPANT_WORDS,
    ROLE_BYTES,
    WORD,
    WORD_STRUCT,
    Layout,
)

_PLACE_BITS = 16
_CREATOR = 1


class ParticipantId(NamedTuple):
    """A place of the pool and which of its users in turn: names one process for ever."""

    place: int
    incarnation: int

    @property
    def word(self) -> int:
        """As it stands in records and leases; 0 is nobody."""
        return self.incarnation << _PLACE_BITS | self.place

    @classmethod
    def of(cls, word: int) -> ParticipantId:
        """The participant that a word names."""
        return cls(word & ((1 << _PLACE_BITS) - 1), word >> _PLACE_BITS)


class ParticipantInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one participant.

    `pid` is its pid in the pid namespace with the inode number `pid_namespace`; `age` is seconds
    since it attached.
    """

    place: int
    incarnation: int
    pid: int
    pid_namespace: int
    is_alive: bool
    is_self: bool
    is_creator: bool
    age: float
    role: str

    def __str__(self) -> str:
        role = f", {self.role}" if self.role else ""
        dead = "" if self.is_alive else ", dead"
        return f"participant {self.place} (pid {self.pid}{role}{dead})"


def utf8_prefix(text: str, size: int) -> bytes:
    """At most `size` bytes of the text, cut between characters."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore").encode()


class Participants:
    """The places of one segment; borrows its memory and locks."""

    def __init__(
        self,
        memory: memoryview,
        words: memoryview,
        layout: Layout,
        places: int,
        locks: FileLocks,
        journal: Journal,
    ) -> None:
        self._memory = memory
        self._words = words
        self._layout = layout
        self._places = places
        self._locks = locks
        self._journal = journal
        self.me: ParticipantId | None = None

    def join(self, role: str, *, is_creator: bool) -> ParticipantId:
        """Become a participant. Call with the pool's lock held."""
        for place in range(self._places):
            if self._incarnation(place) == 0 and self._locks.try_lock(PLACE_BYTE + place):
                return self._fill(place, role, is_creator)
        living = "\n  ".join(str(info) for info in self.infos())
        raise TooManyParticipantsError(
            f"all {self._places} participant places are taken by living processes; close some, or "
            f"create the pool with a larger PoolConfig(max_participants=...):\n  {living}"
        )

    def _fill(self, place: int, role: str, is_creator: bool) -> ParticipantId:
        incarnation: int = self._words[H_NEXT_INCARNATION]
        record = PARTICIPANT.pack(
            incarnation,
            os.getpid(),
            _pid_namespace(),
            _process_start(),
            time.monotonic_ns(),
            _CREATOR if is_creator else 0,
            0,
            0,
            utf8_prefix(role, ROLE_BYTES),
        )
        self._journal.commit(
            [
                (H_NEXT_INCARNATION * WORD, WORD_STRUCT.pack(incarnation + 1)),
                (self._offset(place), record),
            ]
        )
        self.me = ParticipantId(place, incarnation)
        return self.me

    def clear(self, place: int) -> None:
        """Make a place free for the next to join."""
        self._journal.commit([(self._offset(place), bytes(PARTICIPANT.size))])

    def _offset(self, place: int) -> int:
        return self._layout.participants + place * PARTICIPANT.size

    def _incarnation(self, place: int) -> int:
        incarnation: int = self._words[self._layout.participant_word(place)]
        return incarnation

    def _byte_is_held(self, place: int) -> bool:
        if self.me is not None and place == self.me.place:
            return True
        return self._locks.is_locked_by_others(PLACE_BYTE + place)

    def is_alive(self, who: ParticipantId) -> bool:
        """Whether that process is attached and lives; the kernel answers, at once."""
        if who == self.me:
            return True
        if who.place >= self._places or self._incarnation(who.place) != who.incarnation:
            return False
        return who.incarnation != 0 and self._byte_is_held(who.place)

    def is_recorded(self, who: ParticipantId) -> bool:
        """Whether its record is still there: it lives, or died and was not reaped yet."""
        return who.place < self._places and 0 < who.incarnation == self._incarnation(who.place)

    def taken(self) -> Iterator[ParticipantId]:
        """Everyone with a record, living or dead."""
        first = self._layout.participants // WORD
        end = first + self._places * PARTICIPANT_WORDS
        incarnations = self._words[first:end:PARTICIPANT_WORDS].tolist()
        for place, incarnation in enumerate(incarnations):
            if incarnation:
                yield ParticipantId(place, incarnation)

    def dead(self) -> list[ParticipantId]:
        """Those whose record is there and whose process is not."""
        return [who for who in self.taken() if not self._byte_is_held(who.place)]

    def others_live(self) -> bool:
        """Whether anyone but this process is attached: one question to the kernel."""
        return self._locks.is_locked_by_others(PLACE_BYTE, PLACE_BYTES)

    def info(self, who: ParticipantId) -> ParticipantInfo | None:
        """What is recorded of a participant; None when its place was given to another since."""
        if not self.is_recorded(who):
            return None
        record = PARTICIPANT.unpack_from(self._memory, self._offset(who.place))
        incarnation, pid, namespace, _, attached, flags, _, _, role = record
        return ParticipantInfo(
            place=who.place,
            incarnation=incarnation,
            pid=pid,
            pid_namespace=namespace,
            is_alive=self.is_alive(who),
            is_self=who == self.me,
            is_creator=bool(flags & _CREATOR),
            age=max(0, time.monotonic_ns() - attached) / 1e9,
            role=role.decode("utf-8", "replace"),
        )

    def infos(self) -> list[ParticipantInfo]:
        """Everyone with a record, living or dead."""
        return [info for info in map(self.info, self.taken()) if info is not None]

    def describe(self, who: ParticipantId) -> str:
        """For messages: `participant 3 (pid 4242, embedding)`."""
        info = self.info(who)
        return str(info) if info else f"participant {who.place} (gone)"


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _process_start() -> int:
    """Clock ticks after boot at which this process started (proc_pid_stat(5), field 22)."""
    with open("/proc/self/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
