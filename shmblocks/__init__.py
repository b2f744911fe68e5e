"""Shared blocks for multimodal models on one node: write once, hand over a handle, read in place.

Start with `BlockPool.create` and `BlockPool.attach`; `README.md` shows both in twenty lines.
"""

from __future__ import annotations

from shmblocks._os import process as process
from shmblocks._state.check import AllocationInfo, LeaseInfo, PoolStats, Violation
from shmblocks._state.info import PoolSnapshot, PoolSummary
from shmblocks._state.participants import ParticipantId, ParticipantInfo
from shmblocks._state.reclaim import ReapReport
from shmblocks._state.states import State
from shmblocks.config import Field, PoolConfig, multimodal_fields
from shmblocks.errors import (
    CudaUnavailableError,
    ForeignHandleError,
    IncompatiblePoolError,
    InvalidStateError,
    MalformedHandleError,
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
    TransferError,
    UnsupportedPlatformError,
)
from shmblocks.handle import BlockHandle
from shmblocks.inspector import (
    PoolInspector,
    list_pools,
    open_inspector,
    remove_pool,
)
from shmblocks.lease import Lease
from shmblocks.pool import BlockPool
from shmblocks.queue import HandleQueue
from shmblocks.view import BlockView

__all__ = [
    "AllocationInfo",
    "BlockHandle",
    "BlockPool",
    "BlockView",
    "CudaUnavailableError",
    "Field",
    "ForeignHandleError",
    "HandleQueue",
    "IncompatiblePoolError",
    "InvalidStateError",
    "Lease",
    "LeaseInfo",
    "MalformedHandleError",
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
    "SharedMemoryFullError",
    "ShmBlocksError",
    "StaleHandleError",
    "State",
    "TooManyLeasesError",
    "TooManyParticipantsError",
    "TransferError",
    "UnsupportedPlatformError",
    "Violation",
    "list_pools",
    "multimodal_fields",
    "open_inspector",
    "remove_pool",
]
