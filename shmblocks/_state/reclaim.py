"""Giving back what belongs to nobody any more.

Runs under the pool's lock, one journal commit per thing given back: killed at any line it is taken
up by the next, since a dead participant's place is emptied last.

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

from shmblocks._state.blocks import BlockTable
from shmblocks._state.layout import FAILED, Record
from shmblocks._state.participants import ParticipantId, Participants
from shmblocks._state.states import NUMBER, State
from shmblocks._state.wait_queue import WaitingLine

_RESERVED = NUMBER[State.RESERVED]
_PUBLISHED = NUMBER[State.PUBLISHED]
_DRAINING = NUMBER[State.DRAINING]


class ReapReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `reap()` gave back."""

    reservations: int = 0
    leases: int = 0
    unclaimed: int = 0
    blocks: int = 0
    participants: int = 0


def reclaim(
    blocks: BlockTable,
    line: WaitingLine,
    is_gone: Callable[[ParticipantId], bool],
    unclaimed_timeout: float,
) -> ReapReport:
    """Take those who are gone out of the line, release their leases, free their reservations.

    Frees what nobody claimed in time, too.
    """
    for ticket, waiter in list(line.waiters()) if line.length else ():
        if is_gone(ParticipantId.of(waiter.who)):
            line.leave(ticket)
    free_before = blocks.free_blocks
    leases = _release_leases(blocks, is_gone)
    now = time.monotonic_ns()
    patience = int(unclaimed_timeout * 1e9)
    reservations = unclaimed = 0
    earliest = 0
    for start, record in list(blocks.live()):
        if record.state == _RESERVED and is_gone(ParticipantId.of(record.owner)):
            blocks.free(start, record)
            reservations += 1
        elif _is_unfinished(record) and is_gone(ParticipantId.of(record.owner)):
            _end_unfinished(blocks, start, record)
        elif record.state == _PUBLISHED and record.published_ns + patience <= now:
            blocks.free(start, record)
            unclaimed += 1
        else:
            earliest = _earlier(earliest, record, patience)
    if blocks.unclaimed_ns != earliest:
        blocks.note_unclaimed(earliest)
    return ReapReport(
        reservations=reservations,
        leases=leases,
        unclaimed=unclaimed,
        blocks=blocks.free_blocks - free_before,
    )


def _is_unfinished(record: Record) -> bool:
    """Whether a stream was to say that it is ready, and has not."""
    return record.published_ns != 0 and record.ready != record.generation


def _end_unfinished(blocks: BlockTable, start: int, record: Record) -> None:
    if record.state != _DRAINING:
        blocks.free_failed(start, record)
    elif not record.leases:
        blocks.settle(start, record)
    elif not record.ready & FAILED:
        blocks.fail(start, record)


def _release_leases(blocks: BlockTable, is_gone: Callable[[ParticipantId], bool]) -> int:
    released = 0
    for slot, lease in list(blocks.leases()):
        if is_gone(ParticipantId.of(lease.holder)):
            blocks.release(slot, lease)
            released += 1
    return released


def _earlier(earliest: int, record: Record, patience: int) -> int:
    """The earlier of two moments at which something may be unclaimed (0: never)."""
    if record.readers_left == 0:
        return earliest
    moment = record.published_ns + patience
    return min(earliest, moment) if earliest else moment


def reap(
    blocks: BlockTable, line: WaitingLine, participants: Participants, unclaimed_timeout: float
) -> ReapReport:
    """`reclaim` for all who are gone, then empty their places."""
    gone = participants.gone()
    report = reclaim(blocks, line, participants.is_gone, unclaimed_timeout)
    for who in gone:
        participants.clear(who.place)
    return msgspec.structs.replace(report, participants=len(gone))


def is_due(blocks: BlockTable, participants: Participants) -> bool:
    """Whether `reap` may find something: someone is dead, or a deadline has passed."""
    moment = blocks.unclaimed_ns
    return bool(participants.dead()) or 0 < moment <= time.monotonic_ns()
