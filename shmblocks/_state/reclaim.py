"""Giving back what belongs to nobody any more.

Runs under the pool's lock, one journal commit per thing given back: killed at any line it is taken
up by the next, since a dead participant's slot is cleared last.

What the dead hold is taken when they are *gone* (participants.py): a GPU user's last copy is over
then. What such a one had published and its GPU not finished is failed: streams that wait for it go
on, and its readers are told.

What a living process holds is never taken from it, however old; what is published and not yet
opened is taken after the config's `unclaimed_timeout`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from shmblocks._state.blocks import ANNOUNCED, BlockTable
from shmblocks._state.info import ParticipantId, ReapReport
from shmblocks._state.layout import FAILED, UNBOUNDED, LeaseRecord, Record
from shmblocks._state.participants import Participants
from shmblocks._state.states import NUMBER, State
from shmblocks._state.wait_queue import WaitQueue

_RESERVED = NUMBER[State.RESERVED]
_PUBLISHED = NUMBER[State.PUBLISHED]
_DRAINING = NUMBER[State.DRAINING]
_SETTLING = NUMBER[State.SETTLING]

IsGone = Callable[[int], bool]


def reclaim(
    blocks: BlockTable,
    queue: WaitQueue,
    end_claims: Callable[[IsGone], object],
    redeliver: Callable[[int, LeaseRecord], bool],
    is_gone: IsGone,
    unclaimed_timeout: float,
) -> ReapReport:
    """Take those who are gone out of the queue, end their claims, release their leases, free their
    reservations. Frees what nobody claimed in time, too.

    `is_gone` takes a participant word; `redeliver` puts the message of a lease back, if it can.
    """
    end_claims(is_gone)
    for place, waiter in list(queue.waiters()) if queue.length else ():
        if is_gone(waiter.who):
            queue.leave(place)
    free_before = blocks.free_blocks
    leases = _release_leases(blocks, redeliver, is_gone)
    now = time.monotonic_ns()
    unclaimed_ns = int(unclaimed_timeout * 1e9)
    reservations = unclaimed = 0
    earliest = 0
    for start, head in blocks.heads():
        state, owner, readers_left, published_ns = head[0], head[4], head[5], head[8]
        if state == _RESERVED and is_gone(owner):
            blocks.free(start, blocks.record(start))
            reservations += 1
        elif published_ns and head[9] != head[1] and is_gone(owner):
            _end_unfinished(blocks, start, blocks.record(start))
        elif (
            state == _PUBLISHED and readers_left < UNBOUNDED and published_ns + unclaimed_ns <= now
        ):
            blocks.free(start, blocks.record(start))
            unclaimed += 1
        elif 0 < readers_left < UNBOUNDED:
            moment = published_ns + unclaimed_ns
            earliest = min(earliest, moment) if earliest else moment
    overdue, next_due = _end_overdue(blocks, now - unclaimed_ns)
    unclaimed += overdue
    if next_due:
        earliest = min(earliest, next_due + unclaimed_ns) if earliest else next_due + unclaimed_ns
    if blocks.unclaimed_ns != earliest:
        blocks.note_unclaimed(earliest)
    return ReapReport(
        reservations=reservations,
        leases=leases,
        unclaimed=unclaimed,
        blocks=blocks.free_blocks - free_before,
    )


def _end_overdue(blocks: BlockTable, before: int) -> tuple[int, int]:
    """End what was announced by name before that moment and not taken up; how many allocations
    that freed, and the oldest announcement that stays (0: none does)."""
    freed = oldest = 0
    for slot, lease in list(blocks.leases()):
        if lease.kind != ANNOUNCED:
            continue
        if lease.opened_ns <= before:
            free = blocks.free_blocks
            blocks.release(slot, lease)
            freed += blocks.free_blocks > free
        else:
            oldest = min(oldest, lease.opened_ns) if oldest else lease.opened_ns
    return freed, oldest


def _end_unfinished(blocks: BlockTable, start: int, record: Record) -> None:
    if record.state == _SETTLING:
        blocks.settle(start, record)
    elif record.state != _DRAINING:
        blocks.free_failed(start, record)
    elif not record.ready & FAILED:
        blocks.fail(start, record)


def _release_leases(
    blocks: BlockTable, redeliver: Callable[[int, LeaseRecord], bool], is_gone: IsGone
) -> int:
    released = 0
    # The last message first, so that of several the oldest comes to the front.
    leases = list(blocks.leases())
    if any(lease.channel for _, lease in leases):
        leases.sort(key=lambda each: blocks.channel_of(each[0])[2], reverse=True)
    for slot, lease in leases:
        if is_gone(lease.holder):
            if not redeliver(slot, lease):
                blocks.release(slot, lease)
            released += 1
    return released


def reap(
    blocks: BlockTable,
    queue: WaitQueue,
    participants: Participants,
    end_claims: Callable[[IsGone], object],
    redeliver: Callable[[int, LeaseRecord], bool],
    unclaimed_timeout: float,
) -> ReapReport:
    """`reclaim` for all who are gone, then clear their slots."""
    gone = participants.gone()
    known: dict[int, bool] = {}

    def is_gone(word: int) -> bool:
        # One question to the kernel for each process, however many blocks it holds.
        answer = known.get(word)
        if answer is None:
            answer = known[word] = participants.is_gone(ParticipantId.of(word))
        return answer

    report = reclaim(blocks, queue, end_claims, redeliver, is_gone, unclaimed_timeout)
    for who in gone:
        participants.clear(who.slot)
    return msgspec.structs.replace(report, participants=len(gone))


def is_due(blocks: BlockTable, participants: Participants) -> bool:
    """Whether `reap` may find something: someone is dead, or a deadline has passed."""
    moment = blocks.unclaimed_ns
    return bool(participants.dead()) or 0 < moment <= time.monotonic_ns()
