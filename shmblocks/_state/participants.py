"""Who is attached, proved by the kernel.

Contract
- A participant is one attached process. It holds a file lock on the byte of its slot for as long
  as it lives; no process table, pid or heartbeat says who does (`others_stay` looks there only to
  wait a moment for those who are dying).
- A slot is used again after its holder left or died, under a new incarnation number. A participant
  is known by both, so that what the dead one held is never taken for the newcomer's.
- A slot whose record is filled and whose byte is not locked belongs to a dead participant.

Joining, in steps (all under the pool's lock):

  1. lock the byte of a slot whose record is empty;
  2. fill the record, through the journal.

Killed between the two: the byte falls, the record is empty, the slot is free.

Who uses a GPU is *gone* later than it is dead: a copy that its GPU had begun may still write or
read blocks for some milliseconds after the process has lost its slot. So it holds a second lock,
on the byte GPU_BYTE + slot, through the open file description that it has *mapped* and registered
with CUDA, which the kernel closes only when the mapping is gone:

  1. SIGKILL: the threads end, the mappings go, then the descriptors, among them the driver's;
  2. the byte of its slot falls: it is dead, nobody counts on it any more;
  3. the second byte falls: it is gone, what it held may go to others.

Measured on an H100 (driver 580), 9 kills in the middle of copies into a registered segment: the
last byte changed 4 to 6 ms after the kill, the second lock fell after 98 to 132 ms, while the
process table said zombie after 0.1 to 1.5 ms. With this code, 6 kills on two machines: the last
byte changed after 0 to 5 ms, the first lock fell after 41 to 65 ms, the second 2 ms later.

A forked child has its parent's mapping, and with it the parent's description: if it lives on, its
dead parent's blocks stay apart for as long. Nothing else waits for them.

A *writer* is a process that writes into blocks for a participant, and is none itself (the agent of
`shmblocks.nodes` with NIXL, which ends when it hears of its owner's death, and no sooner). It holds
the byte WRITER_BYTE + slot, through a description that its owner has opened and locked for it and
that it has mapped: until the kernel has taken that mapping away, its owner is dead and not gone.
Several writers of one participant share the byte.

What it does not do: give back what the dead held (`reclaim.py`).
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator

from shmblocks import _core
from shmblocks._os.filelock import (
    GPU_BYTE,
    PLACE_BYTE,
    PLACE_BYTES,
    WRITER_BYTE,
    FileLocks,
    lock_byte,
    share_byte,
    unlock_byte,
)
from shmblocks._os.process import is_exiting, pid_namespace, start_ticks
from shmblocks._state.info import ParticipantId, ParticipantInfo
from shmblocks._state.journal import Journal
from shmblocks._state.layout import (
    H_NEXT_INCARNATION,
    P_FLAGS,
    P_PINNED,
    P_WAKE,
    PARTICIPANT,
    PARTICIPANT_WORDS,
    ROLE_BYTES,
    WORD,
    WORD_STRUCT,
)
from shmblocks.errors import InvalidStateError, TooManyParticipantsError

_CREATOR = 1
USES_GPU = 2
HAS_DEVICE_MEMORY = 4
HAS_CORE = 8
# Seconds that the last to leave waits for others who are dying. Smaller: a pool whose other user
# was killed in the same moment stays as a leftover. Larger: leaving takes longer, where the kernel
# needs long to end a process.
DYING_PATIENCE = 1.0
DYING_POLL = 0.002


def utf8_prefix(text: str, size: int) -> bytes:
    """At most `size` bytes of the text, cut between characters."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore").encode()


class Participants:
    """The slots of one segment; borrows its memory and locks."""

    def __init__(
        self,
        memory: memoryview,
        words: memoryview,
        offset: int,
        slots: int,
        locks: FileLocks,
        journal: Journal,
    ) -> None:
        """The `slots` records lie at `offset`."""
        self._memory = memory
        self._words = words
        self._records = offset
        self._slots = slots
        self._locks = locks
        self._journal = journal
        self.me: ParticipantId | None = None
        # The participant word of `me`, 0 for nobody: each operation asks.
        self.me_word = 0
        # What the lock's holder is noted as: slot + 1, 0 for nobody.
        self.holder = 0
        # The slot whose byte is ours while a join goes on; kept when it is interrupted, so that
        # the next one takes the same.
        self._joining: int | None = None

    def join(self, role: str, *, is_creator: bool) -> ParticipantId:
        """Become a participant. Call with the pool's lock held."""
        if self._joining is not None:
            return self._fill(self._joining, role, is_creator)
        for slot in range(self._slots):
            if self._incarnation(slot) == 0 and self._locks.try_lock(PLACE_BYTE + slot):
                self._joining = slot
                return self._fill(slot, role, is_creator)
        living = "\n  ".join(str(info) for info in self.infos())
        raise TooManyParticipantsError(
            f"all {self._slots} participant slots are taken by living processes; close some, or "
            f"create the pool with a larger PoolConfig(max_participants=...):\n  {living}"
        )

    def _fill(self, slot: int, role: str, is_creator: bool) -> ParticipantId:
        incarnation: int = self._words[H_NEXT_INCARNATION]
        record = PARTICIPANT.pack(
            incarnation,
            os.getpid(),
            pid_namespace(),
            start_ticks(),
            time.monotonic_ns(),
            (_CREATOR if is_creator else 0) | (HAS_CORE if _core.is_used() else 0),
            0,
            0,
            utf8_prefix(role, ROLE_BYTES),
        )
        self._journal.commit(
            [
                (H_NEXT_INCARNATION * WORD, WORD_STRUCT.pack(incarnation + 1)),
                (self._offset(slot), record),
            ]
        )
        self.me = ParticipantId(slot, incarnation)
        self.me_word = self.me.word
        self.holder = slot + 1
        self._joining = None
        return self.me

    def forget(self) -> None:
        """Be nobody, when the locks are gone or somebody else's."""
        self.me = self._joining = None
        self.me_word = self.holder = 0

    def clear(self, slot: int) -> None:
        """Make a slot free for the next to join."""
        self._journal.commit([(self._offset(slot), bytes(PARTICIPANT.size))])

    def _offset(self, slot: int) -> int:
        return self._records + slot * PARTICIPANT.size

    def _word(self, slot: int) -> int:
        return self._records // WORD + slot * PARTICIPANT_WORDS

    def wake_offset(self, slot: int) -> int:
        """Where the word lies that the slot's waiters sleep on, in bytes."""
        return (self._word(slot) + P_WAKE) * WORD

    def _incarnation(self, slot: int) -> int:
        incarnation: int = self._words[self._word(slot)]
        return incarnation

    def _byte_is_held(self, slot: int) -> bool:
        if self.me is not None and slot == self.me.slot:
            return True
        return self._locks.is_locked_by_others(PLACE_BYTE + slot)

    def is_alive(self, who: ParticipantId) -> bool:
        """Whether that process is attached and lives; the kernel answers, at once."""
        if who == self.me:
            return True
        if who.slot >= self._slots or self._incarnation(who.slot) != who.incarnation:
            return False
        return who.incarnation != 0 and self._byte_is_held(who.slot)

    def is_gone(self, who: ParticipantId) -> bool:
        """Whether it is dead, if it used a GPU its last copy is provably over, and nobody writes
        into blocks for it any more."""
        if self.is_alive(who):
            return False
        if not self.is_recorded(who):
            return True  # its slot was emptied, which comes after all this
        return not (
            self._locks.is_locked_by_others(GPU_BYTE + who.slot) or self._has_writer(who.slot)
        )

    def open_for_writer(self) -> io.FileIO:
        """Under the lock: a description of the segment for a process that writes for this one.

        While it is open or mapped anywhere, what we hold goes to nobody else.
        """
        me = self.me
        if me is None:
            raise InvalidStateError("only a participant has writers")
        file = self._locks.open_again()
        # Nobody takes this byte for himself, so that it is never refused.
        share_byte(file.fileno(), WRITER_BYTE + me.slot)
        return file

    def have_writer(self) -> bool:
        """Whether some process still writes for this one."""
        return self.me is not None and self._has_writer(self.me.slot)

    def _has_writer(self, slot: int) -> bool:
        return self._locks.is_locked_by_others(WRITER_BYTE + slot)

    def becomes_gpu_user(self, mapped_fd: int) -> None:
        """Under the lock: hold the second byte, and say so.

        `mapped_fd` is of the description that this process has mapped and registers with CUDA.
        """
        me = self.me
        if me is None or not lock_byte(mapped_fd, GPU_BYTE + me.slot):
            raise InvalidStateError(
                "the GPU cannot be used through this pool object: it was used here before"
            )
        self.note_flags(USES_GPU)

    def was_gpu_user(self, mapped_fd: int) -> None:
        """Give the second byte back: nothing of ours runs on a GPU any more."""
        if self.me is not None and mapped_fd >= 0:
            unlock_byte(mapped_fd, GPU_BYTE + self.me.slot)

    def note_flags(self, flags: int) -> None:
        """Under the lock: add flags to our record; one store."""
        if self.me is not None:
            self._words[self._word(self.me.slot) + P_FLAGS] |= flags

    def note_pinned(self, size: int) -> None:
        """Under the lock: say how many bytes of the segment we have registered with CUDA."""
        if self.me is not None:
            self._words[self._word(self.me.slot) + P_PINNED] = size

    def is_recorded(self, who: ParticipantId) -> bool:
        """Whether its record is still there: it lives, or died and was not reaped yet."""
        return who.slot < self._slots and 0 < who.incarnation == self._incarnation(who.slot)

    def taken(self) -> Iterator[ParticipantId]:
        """Everyone with a record, living or dead."""
        first = self._records // WORD
        end = first + self._slots * PARTICIPANT_WORDS
        incarnations = self._words[first:end:PARTICIPANT_WORDS].tolist()
        for slot, incarnation in enumerate(incarnations):
            if incarnation:
                yield ParticipantId(slot, incarnation)

    def dead(self) -> list[ParticipantId]:
        """Those whose record is there and whose process is not."""
        return [who for who in self.taken() if not self._byte_is_held(who.slot)]

    def gone(self) -> list[ParticipantId]:
        """Those of the dead whose last copy is over."""
        return [who for who in self.dead() if self.is_gone(who)]

    def others_live(self) -> bool:
        """Whether anyone but this process is attached: one question to the kernel."""
        return self._locks.is_locked_by_others(PLACE_BYTE, PLACE_BYTES)

    def others_stay(self) -> bool:
        """Whether another process will stay attached. Exiting processes don't count: this waits
        up to `DYING_PATIENCE` seconds for them.

        A killed process holds its slot until the kernel has closed its descriptors, but others may
        hear of its death before that (through a closed socket). If the last living process left in
        between, it would count the dying one as attached, and nobody would remove the pool.
        """
        deadline = time.monotonic() + DYING_PATIENCE
        while self.others_live():
            if time.monotonic() > deadline or not self._all_others_are_dying():
                return True
            time.sleep(DYING_POLL)
        return False

    def _all_others_are_dying(self) -> bool:
        namespace = pid_namespace()
        dying = False
        for who in self.taken():
            if who == self.me or not self._byte_is_held(who.slot):
                continue
            record = PARTICIPANT.unpack_from(self._memory, self._offset(who.slot))
            if record[2] != namespace or not is_exiting(record[1], record[3]):
                return False
            dying = True
        return dying

    def info(self, who: ParticipantId) -> ParticipantInfo | None:
        """What is recorded of a participant; None when its slot was given to another since."""
        if not self.is_recorded(who):
            return None
        record = PARTICIPANT.unpack_from(self._memory, self._offset(who.slot))
        incarnation, pid, namespace, _, attached, flags, _, pinned, role = record
        return ParticipantInfo(
            slot=who.slot,
            incarnation=incarnation,
            pid=pid,
            pid_namespace=namespace,
            is_alive=self.is_alive(who),
            is_self=who == self.me,
            is_creator=bool(flags & _CREATOR),
            age_seconds=max(0, time.monotonic_ns() - attached) / 1e9,
            role=role.decode("utf-8", "replace"),
            uses_gpu=bool(flags & USES_GPU),
            has_device_memory=bool(flags & HAS_DEVICE_MEMORY),
            pinned_bytes=pinned,
            has_core=bool(flags & HAS_CORE),
        )

    def infos(self) -> list[ParticipantInfo]:
        """Everyone with a record, living or dead."""
        return [info for info in map(self.info, self.taken()) if info is not None]

    def describe(self, who: ParticipantId) -> str:
        """For messages: `participant 3 (pid 4242, embedding)`."""
        info = self.info(who)
        return str(info) if info else f"participant {who.slot} (gone)"
