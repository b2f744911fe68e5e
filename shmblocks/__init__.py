"""Shared blocks for multimodal models on one node: write once, hand over a handle, read in place.

Start with `BlockPool.create` and `BlockPool.attach`; `README.md` shows both in twenty lines.

    pool  lease  view  queue     what users hold: small, checks arguments, one state call each
    _alloc_wait                  waiting for blocks
    _state/                      every shared byte and every change to it, under the segment's lock
    _os/                         one kernel facility each
    cuda/                        the GPU part; imported only by a process that asks for it
    transfer/  cli/  doctor/  testing/                 what stands on that
"""

from __future__ import annotations

from shmblocks._os import process as process
from shmblocks._state.info import (
    AllocationInfo,
    LeaseInfo,
    ParticipantId,
    ParticipantInfo,
    PoolSnapshot,
    PoolStats,
    PoolSummary,
    ReapReport,
    Violation,
    WaiterInfo,
)
from shmblocks._state.layout import UNBOUNDED
from shmblocks._state.states import State
from shmblocks.config import Field, PoolConfig, multimodal_fields
from shmblocks.errors import (
    AuthenticationError,
    CudaUnavailableError,
    DamagedPoolError,
    ForeignHandleError,
    IncompatibleConfigError,
    IncompatiblePoolError,
    InvalidStateError,
    KeyExistsError,
    MalformedHandleError,
    MalformedMessageError,
    PeerDiedError,
    PoolClosedError,
    PoolExistsError,
    PoolNotFoundError,
    PoolPermissionError,
    PoolTimeoutError,
    SharedMemoryFullError,
    ShmBlocksError,
    StaleHandleError,
    TooManyLeasesError,
    TooManyParticipantsError,
    TooManyWaitersError,
    TransferError,
    UnsupportedPlatformError,
)
from shmblocks.handle import BlockHandle
from shmblocks.inspector import PoolInspector, list_pools, remove_pool
from shmblocks.lease import Lease, Reservation
from shmblocks.pool import BlockPool
from shmblocks.queue import HandleQueue
from shmblocks.view import BlockView

__all__ = [
    "UNBOUNDED",
    "AllocationInfo",
    "AuthenticationError",
    "BlockHandle",
    "BlockPool",
    "BlockView",
    "CudaUnavailableError",
    "DamagedPoolError",
    "Field",
    "ForeignHandleError",
    "HandleQueue",
    "IncompatibleConfigError",
    "IncompatiblePoolError",
    "InvalidStateError",
    "KeyExistsError",
    "Lease",
    "LeaseInfo",
    "MalformedHandleError",
    "MalformedMessageError",
    "ParticipantId",
    "ParticipantInfo",
    "PeerDiedError",
    "PoolClosedError",
    "PoolConfig",
    "PoolExistsError",
    "PoolInspector",
    "PoolNotFoundError",
    "PoolPermissionError",
    "PoolSnapshot",
    "PoolStats",
    "PoolSummary",
    "PoolTimeoutError",
    "ReapReport",
    "Reservation",
    "SharedMemoryFullError",
    "ShmBlocksError",
    "StaleHandleError",
    "State",
    "TooManyLeasesError",
    "TooManyParticipantsError",
    "TooManyWaitersError",
    "TransferError",
    "UnsupportedPlatformError",
    "Violation",
    "WaiterInfo",
    "list_pools",
    "multimodal_fields",
    "remove_pool",
]
