"""One lifecycle for pools and queues: made, named, attached, joined, forked, left.

A mapped segment with its locks, its journal and its participants. `PoolState` and `QueueState` are
the two kinds; everything about their life is here.

Contract
- A segment is whole or it is not there: `create` and `attach` give a whole one, or raise and leave
  nothing behind.
- Leaving is idempotent and cannot fail half way: whatever happens inside, this process holds
  nothing of the segment afterwards. The last one to leave removes it.
- After a fork the child has locks of its own and holds nothing of its parent's. It becomes a
  participant at its first transaction. A segment that the child cannot open again is closed there,
  and its next call says why; the others are not touched by that.
- A segment of which nobody in this process holds the object any more is left at once, also at the
  end of the process (`lifetime.py`).

Creating and attaching meet like this:

  creator   1 makes and fills a nameless segment, joins it, so that it is alive from the start
            2 claims the name (naming.py)
  attacher  1 opens the name, checks the bytes, maps
            2 joins in a transaction: the segment must live, not be removed, and still have its name
              (else a creator or the last leaver was faster: it is not found, and tried again)
  leaver    in a transaction: gives everything back, clears its slot, and if nobody else lives marks
            the segment as removed and unlinks it

so that nobody joins a segment that is being replaced or removed, and nobody removes one that lives.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import time
from collections.abc import Callable
from typing import ClassVar, Protocol, TypeVar

from shmblocks._os.filelock import FileLocks
from shmblocks._os.process import clock_offset_ns
from shmblocks._os.segment import Segment
from shmblocks._state import lifetime
from shmblocks._state.info import ParticipantId, ParticipantInfo
from shmblocks._state.journal import Journal
from shmblocks._state.layout import (
    H_CLOCK_OFFSET,
    H_CREATED,
    H_LOCK_HOLDER,
    H_REMOVED,
    Layout,
    QueueLayout,
)
from shmblocks._state.mutex import Mutex, transaction
from shmblocks._state.naming import anyone_lives, claim_name
from shmblocks._state.participants import Participants
from shmblocks.errors import (
    IncompatiblePoolError,
    PoolNotFoundError,
    PoolTimeoutError,
    ShmBlocksError,
    TooManyParticipantsError,
)

S = TypeVar("S", bound="SharedSegment")

# Of so many sections under the lock of a segment, one is timed. Smaller: each operation pays more.
# Larger: a rare long section is seen less often.
TIMED_OF = 64
# Seconds between two attempts to find a segment that is not there yet.
ATTACH_POLL = 0.01


class Compiled(Protocol):
    """The compiled operations on one segment (`shmblocks._core`).

    They run while they are `joined`: a transaction hands them the lock's descriptor and who we are,
    and whoever changes either takes that back first.
    """

    @property
    def has_joined(self) -> bool: ...

    def join(self, fd: int, me: int, holder: int, /) -> None: ...

    def forget(self) -> None: ...

    def drop(self) -> None: ...


class SharedSegment:
    """One segment as one process sees it. Owns the mapping and the file locks."""

    # How messages name it.
    kind: ClassVar[str]

    def __init__(
        self,
        fd: int,
        name: str,
        layout: Layout | QueueLayout,
        slots: int,
        lock_timeout: float,
    ) -> None:
        """Map the segment behind `fd` (which stays the caller's), without joining it."""
        self.name = name
        self.role = ""
        self.segment = Segment(fd, layout.segment_bytes, name, self.kind)
        self.locks = FileLocks(fd)
        self.mutex = Mutex(self.locks, f"{self.kind} {name}", lock_timeout)
        memory, words = self.segment.memory, self.segment.words
        self.journal = Journal(
            memory, words, layout.journal, layout.journal_bytes, layout.state_bytes
        )
        self.participants = Participants(
            memory, words, layout.participants, slots, self.locks, self.journal
        )
        self._words = words
        self._journal_head = self.journal.head
        # Whether this process takes part: then a forked child joins at its first transaction.
        self._takes_part = False
        self._was_last = False
        self._compiled: Compiled | None = None
        self._is_timed = itertools.cycle((True, *(False,) * (TIMED_OF - 1))).__next__
        lifetime.register(self)

    @property
    def is_closed(self) -> bool:
        """Whether this process has left it, or never joined and let go of it."""
        return self.locks.file.closed

    @property
    def what(self) -> str:
        """For messages: `pool /vision`."""
        return f"{self.kind} {self.name}"

    @property
    def created_ns(self) -> int:
        """When it was created, on the system's monotonic clock."""
        moment: int = self.segment.words[H_CREATED]
        return moment

    # ---- joining -----------------------------------------------------------------------------

    def publish_name(self, fd: int, role: str, prepare: Callable[[], object] | None = None) -> None:
        """As the creator: join, so that it lives from the start; fill it; claim the name.

        Whatever is raised, then or before the caller has stored it: the caller leaves.
        """
        self.role = role
        self._join_as_creator()
        if prepare is not None:
            prepare()
        claim_name(fd, self.kind, self.name, self.mutex.timeout)
        lifetime.watch_exit()

    def join(self: S, role: str) -> S:
        """Become a participant of an existing segment, or leave no trace."""
        self.role = role
        try:
            self._join_existing()
            lifetime.watch_exit()
            return self
        except BaseException:
            self.leave()
            raise

    @transaction
    def _join_as_creator(self) -> None:
        self.segment.words[H_CLOCK_OFFSET] = _as_word(clock_offset_ns())
        self._take_slot(is_creator=True)
        self._takes_part = True

    @transaction
    def _join_existing(self) -> None:
        if self.segment.words[H_REMOVED] or not self.segment.has_name:
            raise PoolNotFoundError(f"{self.what}: it was removed just now")
        if not anyone_lives(self.locks):
            raise PoolNotFoundError(
                f"{self.what}: all its processes are dead, what is there is a leftover; the next "
                "`create` of that name replaces it (`shmblocks reap --all` removes it)"
            )
        self._refuse_other_clock()
        self._take_slot(is_creator=False)
        self._takes_part = True

    def _refuse_other_clock(self) -> None:
        """A process whose monotonic clock has another offset would see every age wrong."""
        creators, ours = self.segment.words[H_CLOCK_OFFSET], _as_word(clock_offset_ns())
        if creators != ours:
            raise IncompatiblePoolError(
                f"{self.what}: the clock of this process's time namespace differs from the "
                f"creator's by {abs(_as_offset(ours) - _as_offset(creators)) / 1e9:.1f} s, so that "
                "it would reap what others published a moment ago; run both in one time namespace "
                "(a restored container has its own)"
            )

    def _take_slot(self, *, is_creator: bool) -> ParticipantId:
        """In a transaction: join; when every slot is taken, the slots of the dead are cleared."""
        try:
            who = self.participants.join(self.role, is_creator=is_creator)
        except TooManyParticipantsError:
            if not self._clear_dead():
                raise
            who = self.participants.join(self.role, is_creator=is_creator)
        self._hand_over()
        return who

    def _hand_over(self) -> None:
        """In a transaction: let the compiled operations run from here on."""
        compiled, me = self._compiled, self.participants.me_word
        if compiled is not None and me and not compiled.has_joined:
            compiled.join(self.locks.fd, me, self.participants.holder)

    def _clear_dead(self) -> int:
        """In a transaction: give back what the dead held, clear their slots; how many."""
        dead = self.participants.dead()
        for who in dead:
            self.participants.clear(who.slot)
        return len(dead)

    # ---- transactions ------------------------------------------------------------------------

    def entered(self) -> None:
        """First in every transaction: complete what a dead holder left; join after a fork."""
        words = self._words
        words[H_LOCK_HOLDER] = holder = self.participants.holder
        if words[self._journal_head]:
            self.journal.replay()
            self._note_takeover()
        if self._is_timed():
            self.mutex.timed_since_ns = time.monotonic_ns()
        if not holder and self._takes_part:
            self._take_slot(is_creator=False)
            words[H_LOCK_HOLDER] = self.participants.holder
        if self._compiled is not None:
            self._hand_over()

    def _note_takeover(self) -> None:
        """In a transaction: what another process left half made was completed."""

    def describe_holder(self) -> str:
        """The last that entered, for messages; runs without the lock."""
        slot = self.segment.words[H_LOCK_HOLDER] - 1
        for who in self.participants.taken():
            if who.slot == slot:
                return self.participants.describe(who)
        return "a process that is not attached (an inspector, or one that has left since)"

    @transaction
    def take_part(self) -> None:
        """Nothing but what every transaction does first: in a forked child it joins."""

    @transaction
    def participant_infos(self) -> list[ParticipantInfo]:
        """Everyone attached, and the dead who were not reaped yet."""
        return self.participants.infos()

    @transaction
    def open_for_writer(self) -> io.FileIO:
        """A description of the segment for a process that writes into blocks for this one: until
        its last copy and mapping are gone, nobody else gets what this process holds."""
        return self.participants.open_for_writer()

    @transaction
    def is_alive(self, who: ParticipantId) -> bool:
        """Whether that process is attached and lives."""
        return self.participants.is_alive(who)

    @transaction
    def describe(self, who: ParticipantId) -> str:
        """For messages: `participant 3 (pid 4242, embedding)`."""
        return self.participants.describe(who)

    @transaction
    def find_participant(self, role: str) -> ParticipantId | None:
        """A living participant of that role."""
        for info in self.participants.infos():
            if info.role == role and info.is_alive:
                return ParticipantId(info.slot, info.incarnation)
        return None

    # ---- leaving -----------------------------------------------------------------------------

    def leave(self) -> None:
        """Leave in an orderly way, as the last one remove the segment. Idempotent.

        The mapping goes at once, or with its last view. After any error but
        `PoolTimeoutError` this process has left.
        """
        self.segment.stop_prefault()
        if self.is_closed:
            return
        try:
            self._leave()
        except PoolTimeoutError:
            raise  # a stopped process holds the lock: nothing was given back, nothing was left
        except (ShmBlocksError, OSError):
            self.close()  # what cannot be given back in an orderly way is reaped by others
            raise
        except BaseException:
            if not self.is_closed:
                self._leave()  # interrupted: to the end
            raise

    @transaction
    def _leave(self) -> None:
        """Give everything back, as the last one remove the segment, and let go.

        It may run again after it was interrupted anywhere. It lets go inside the transaction: no
        other thread is inside then, or about to lock the descriptor. Closing that also releases
        our slot's byte lock; until then the slot stays ours.
        """
        me = self.participants.me
        if me is not None:
            if not self.participants.have_writer():
                self._give_back(me)
                self.participants.clear(me.slot)
            # Else others give it back, as a dead one's, as soon as nobody writes for us any more.
            self._was_last = not self.participants.others_stay()
            if self._was_last:
                self.segment.words[H_REMOVED] = 1
                self.segment.unlink()
            else:
                lifetime.remember_left(self.name, self.segment.identity)
        self.drop()

    def _give_back(self, me: ParticipantId) -> None:
        """In a transaction: give back what this participant holds."""

    def close(self) -> None:
        """Drop the locks and the mapping and nothing else, as death does. Idempotent."""
        self.segment.stop_prefault()
        if not self.is_closed:
            self.drop()

    def drop(self) -> None:
        """Let go; the mapping goes at once, or with its last view. Interrupted: to the end."""
        try:
            self._let_go()
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        """Every step of it may be repeated."""
        self._takes_part = False
        if self._compiled is not None:
            self._compiled.drop()
        self.locks.close()
        self.segment.drop()
        self.participants.forget()

    # ---- after a fork ------------------------------------------------------------------------

    def reset_after_fork(self) -> None:
        """In a forked child, before anything else there uses the segment."""
        if self._compiled is not None:
            self._compiled.forget()
        self.segment.forget_parent()
        self.participants.forget()
        if self.mutex.reset_after_fork():
            self.mutex.why_closed = (
                "this child was forked by a signal handler in the middle of an operation; "
                "attach it again"
            )
            self.drop()
            return
        if self.is_closed:
            return
        try:
            self.locks.reopen_after_fork()
        except OSError as error:
            self.mutex.why_closed = (
                f"this forked child could not open it again ({os.strerror(error.errno or 0)}): "
                + _ADVICE.get(error.errno or 0, "attach it in this process")
            )
            self.drop()


_ADVICE = {
    errno.EACCES: "it now runs as another user; use PoolConfig(group=...), or attach before setuid",
    errno.EMFILE: "no file descriptor is free; raise `ulimit -n`, then attach it in this process",
}


def _as_word(offset: int) -> int:
    return offset & ((1 << 64) - 1)


def _as_offset(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
