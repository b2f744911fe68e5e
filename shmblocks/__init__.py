"""Shared blocks for multimodal models on one node: write once, hand over a handle, read in place.

Start with `BlockPool.create` and `BlockPool.attach`; `README.md` shows both in one example. Where
things live, from the bottom to the top (a part imports only parts of the lines above its own):

    errors  _words                              every error, and who has to act; numbers as text
    config  handle  keys                        values: what a pool holds, what crosses a queue
    _os/  _core/                                one kernel facility each; hot operations in C
    _state/                                     every shared byte, and every change to it
    queue  view  inspector                      HandleQueue, tensors, looking
    _alloc_wait  _claim_wait  tickets           waiting for blocks and claims; leases that travel
    cuda/                                       the GPU part
    lease                                       what a process holds, as context managers
    channel                                     blocks from process to process, inside the pool
    pool                                        BlockPool
    nodes/  metrics  traces                     other machines; Prometheus; OpenTelemetry
    cache  sglang  testing/  transfer/          TensorCache; SGLang; deaths; encode/language
    sglang_plugin/  vllm/  vllm_omni            engines that need no patch
    doctor/                                     what will fail on this machine
    cli/                                        the command line
"""

from __future__ import annotations

from shmblocks._os import process as process
from shmblocks._state.info import (
    AllocationInfo,
    CacheStats,
    CounterValues,
    EntryInfo,
    HistogramValues,
    LeaseInfo,
    NodePeerInfo,
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
from shmblocks.channel import Channel
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
from shmblocks.inspector import PoolInspector, list_pools, remove_dead_pools, remove_pool
from shmblocks.keys import Namespace, content_key
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
    "CacheStats",
    "Channel",
    "CounterValues",
    "CudaUnavailableError",
    "DamagedPoolError",
    "EntryInfo",
    "Field",
    "ForeignHandleError",
    "HandleQueue",
    "HistogramValues",
    "IncompatibleConfigError",
    "IncompatiblePoolError",
    "InvalidStateError",
    "KeyExistsError",
    "Lease",
    "LeaseInfo",
    "MalformedHandleError",
    "MalformedMessageError",
    "Namespace",
    "NodePeerInfo",
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
    "content_key",
    "list_pools",
    "multimodal_fields",
    "remove_dead_pools",
    "remove_pool",
]
