"""What the commands found, as data. Printed as it is by `--json`, so the keys are a promise.

Own types and not the library's: those may gain fields and change names, these keys may only be
added to. Every size says bytes, every duration seconds.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from shmblocks.config import PoolConfig
from shmblocks.doctor import CheckResult


def _about(text: str) -> msgspec.Meta:
    """A description for the help."""
    return msgspec.Meta(description=text)


PoolState = Annotated[str, _about("alive | dead | incompatible")]
Seconds = Annotated[float, _about("seconds")]
Bytes = Annotated[int, _about("bytes")]


class PoolRow(msgspec.Struct, frozen=True, kw_only=True):
    """One pool of `ls`. Numbers of what is inside are null where it cannot be read."""

    name: str
    state: PoolState
    size_bytes: Bytes
    participants: Annotated[int | None, _about("living ones")]
    dead_participants: int | None
    block_size: Annotated[int | None, _about("tokens")]
    total_blocks: int | None
    free_blocks: int | None
    problem: Annotated[str, _about("why it cannot be read")]


class LsReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks ls`."""

    pools: tuple[PoolRow, ...]


class Blocks(msgspec.Struct, frozen=True, kw_only=True):
    """The account: free + reserved + published + leased + draining = all."""

    free: int
    reserved: int
    published: int
    leased: int
    draining: int
    all: int
    balanced: Annotated[bool, _about("whether the account adds up")]


class ParticipantRow(msgspec.Struct, frozen=True, kw_only=True):
    """One attached process, living or dead."""

    place: int
    incarnation: Annotated[int, _about("tells users of one place apart")]
    pid: Annotated[int, _about("as counted in its own pid namespace")]
    pid_namespace: Annotated[int, _about("inode number")]
    alive: Annotated[bool, _about("the kernel says so")]
    creator: bool
    role: str
    age_seconds: Seconds
    uses_gpu: bool = False
    has_device_memory: Annotated[bool, _about("has the pool's CUDA memory open")] = False
    pinned_bytes: Annotated[int, _about("of the segment, registered with CUDA")] = 0


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU part of a pool."""

    device: Annotated[str, _about("where the fields lie, as the creator counts its devices")]
    device_bytes: Bytes
    state: Annotated[str, _about("empty for a pool in host memory")]
    openers: Annotated[int, _about("living processes that have the CUDA memory open")]
    gpu_users: int
    pinned_bytes: Annotated[int, _about("registered with CUDA, over all living processes")]
    pending_leases: Annotated[int, _about("released on a stream that is not there yet")]
    settling_allocations: Annotated[int, _about("given back while a stream works on them")]


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds something: enough to find it among the participants, and to name it."""

    place: int
    incarnation: int
    pid: Annotated[int | None, _about("null: it left, nothing is recorded of it any more")]
    role: str
    alive: bool


class LeaseRow(msgspec.Struct, frozen=True, kw_only=True):
    """One open lease."""

    holder: Holder
    kind: Annotated[str, _about("reads | writes")]
    age_seconds: Seconds


class AllocationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One allocation."""

    start_block: int
    num_blocks: int
    num_tokens: int
    generation: int
    state: Annotated[str, _about("reserved | published | leased | draining")]
    owner: Holder
    request_id: Annotated[str | None, _about("null: none was given")]
    age_seconds: Seconds
    readers_left: Annotated[int, _about("leases yet to be opened")]
    leases: tuple[LeaseRow, ...]


class StatReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks stat`."""

    name: str
    pool_id: Annotated[str, _about("16 hexadecimal digits: a number that JSON readers would round")]
    state: PoolState
    size_bytes: Bytes
    config: PoolConfig
    blocks: Blocks
    participants: tuple[ParticipantRow, ...]
    allocations: tuple[AllocationRow, ...]
    device: DeviceRow | None = None


class MapReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks map`: what the picture is drawn from."""

    name: str
    block_size: Annotated[int, _about("tokens")]
    blocks: Blocks
    participants: tuple[ParticipantRow, ...]
    allocations: tuple[AllocationRow, ...]


class ViolationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One broken invariant."""

    invariant: int
    message: str


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks check`."""

    name: str
    whole: Annotated[bool, _about("whether there is no violation")]
    violations: tuple[ViolationRow, ...]


class RmReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks rm`."""

    name: str
    removed: bool
    participants: Annotated[
        tuple[ParticipantRow, ...], _about("the living ones: why it refused, or whom it overruled")
    ]


class ReapRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to one pool."""

    name: str
    state: Annotated[PoolState, _about("before: alive | dead | incompatible")]
    reservations: Annotated[int, _about("of dead writers, freed")] = 0
    leases: Annotated[int, _about("of dead readers, released")] = 0
    unclaimed: Annotated[int, _about("published, opened by nobody in time, freed")] = 0
    blocks: Annotated[int, _about("blocks that came back")] = 0
    participants: Annotated[int, _about("places of the dead, emptied")] = 0
    removed: Annotated[bool, _about("the whole pool: nobody lived in it")] = False
    freed_bytes: Annotated[int, _about("bytes of shared memory that came back")] = 0
    skipped: Annotated[str, _about("why it was left alone")] = ""


class ReapAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks reap`."""

    pools: tuple[ReapRow, ...]


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks doctor`."""

    healthy: Annotated[bool, _about("whether no check failed")]
    checks: tuple[CheckResult, ...]
