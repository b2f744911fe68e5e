"""Every error that shmblocks raises, and who has to act on it.

    ShmBlocksError
     +- PoolNotFoundError          no pool of that name: start its creator, or wait with `timeout=`
     +- PoolExistsError            the name is held by a living pool: attach, or take another name
     +- IncompatiblePoolError      the segment is foreign, truncated or of another layout version
     +- PoolPermissionError        the pool belongs to another user (also a PermissionError)
     +- SharedMemoryFullError      /dev/shm cannot hold the pool (also a MemoryError)
     +- PoolClosedError            you closed this pool object, or its segment was taken away
     +- MalformedHandleError       the bytes are no handle of any pool
     +- ForeignHandleError         a handle, but of another pool
     +- StaleHandleError           what it names was freed, grown or published anew since
     +- InvalidStateError          not allowed in the state that the allocation is in
     +- PeerDiedError              the process at the other end is dead
     +- PoolTimeoutError           a deadline passed (also a TimeoutError); it says who is
     |                             in the way
     +- TooManyParticipantsError   all places of the pool are taken by living processes
     +- TooManyLeasesError         all lease slots of the pool are in use
     +- TransferError              a transfer ended as Failed; the text is the reason
     +- CudaUnavailableError       this process cannot use the GPU that it asked for; the text says
     |                             what is missing
     +- UnsupportedPlatformError   not Linux on x86-64 or aarch64 (also an ImportError)

"No room now" is no error: it is `None` (or, for a wait, a `PoolTimeoutError`). Arguments of a wrong
type or value raise `TypeError` or `ValueError`, as everywhere in Python.
"""

from __future__ import annotations


class ShmBlocksError(Exception):
    """Base class of all errors of this library."""


class PoolNotFoundError(ShmBlocksError):
    """There is no pool of that name on this node."""


class PoolExistsError(ShmBlocksError):
    """A living pool holds the name."""


class IncompatiblePoolError(ShmBlocksError):
    """The segment exists, but is not a pool that this version can use."""


class PoolPermissionError(ShmBlocksError, PermissionError):
    """The pool belongs to another user."""


class SharedMemoryFullError(ShmBlocksError, MemoryError):
    """The shared memory file system has no room for the pool."""


class PoolClosedError(ShmBlocksError):
    """The pool object was closed in this process."""


class MalformedHandleError(ShmBlocksError):
    """Bytes or numbers that cannot be a handle of the pool."""


class ForeignHandleError(ShmBlocksError):
    """A handle of another pool."""


class StaleHandleError(ShmBlocksError):
    """The allocation that the handle names is not there any more."""


class InvalidStateError(ShmBlocksError):
    """The operation is not allowed in the allocation's present state."""


class PeerDiedError(ShmBlocksError):
    """A process that this one depends on has died."""


class PoolTimeoutError(ShmBlocksError, TimeoutError):
    """A deadline passed; the message names those who are in the way."""


class TooManyParticipantsError(ShmBlocksError):
    """Every participant place of the pool belongs to a living process."""


class TooManyLeasesError(ShmBlocksError):
    """Every lease slot of the pool is in use."""


class TransferError(ShmBlocksError):
    """A transfer between two endpoints ended as Failed."""


class CudaUnavailableError(ShmBlocksError):
    """This process cannot use the GPU, or a call of its driver failed."""


class UnsupportedPlatformError(ShmBlocksError, ImportError):
    """The operating system or processor cannot run shmblocks."""
