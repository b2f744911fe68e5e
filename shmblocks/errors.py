"""Every error that shmblocks raises, and who has to act on it.

    ShmBlocksError
     +- PoolNotFoundError          no pool or queue of that name: start its creator, or wait with
     |                             `timeout=`
     +- PoolExistsError            a living process uses the name: attach, or take another name
     +- IncompatiblePoolError      the segment has another layout version, or is not from shmblocks
     +- IncompatibleConfigError    the pool exists, but its config differs from yours (`ensure`)
     +- DamagedPoolError           the segment holds bytes that no operation writes: something else
     |                             wrote into it; remove it and create it anew
     +- PoolPermissionError        the pool belongs to another user, or /dev/shm refuses you (also a
     |                             PermissionError)
     +- SharedMemoryFullError      the machine cannot give the memory: /dev/shm, a limit of the
     |                             process or of its container; the text says which (also a
     |                             MemoryError)
     +- PoolClosedError            this object was closed, or its segment was taken away
     +- MalformedHandleError       the bytes are not a handle of any pool
     +- MalformedMessageError      a queue held a message of another type than this one expects
     +- ForeignHandleError         a handle, but of another pool
     +- StaleHandleError           its allocation was freed, grown or published anew since
     +- InvalidStateError          not allowed in the state that the allocation is in
     +- KeyExistsError             an entry of that key is in the cache already: use it
     +- PeerDiedError              the process at the other end is dead
     +- PoolTimeoutError           a deadline passed (also a TimeoutError); the text says who is in
     |                             the way
     +- TooManyParticipantsError   living processes use all slots of the pool or queue
     +- TooManyLeasesError         all lease slots of the pool are in use
     +- TooManyWaitersError        all slots of the wait queue are in use
     +- AuthenticationError        the other machine did not prove that it knows the shared secret
     +- TransferError              a transfer ended as Failed; the text is the reason
     +- CudaUnavailableError       this process cannot use the GPU that it asked for; the text says
     |                             what is missing
     +- UnsupportedPlatformError   not Linux on x86-64 or aarch64 (also an ImportError)

Nothing raises the base class itself. Too few free blocks are not an error: the answer is `None`
(or, after a wait, a `PoolTimeoutError`). Arguments of a wrong type or value raise `TypeError` or
`ValueError`, as everywhere in Python.
"""

from __future__ import annotations


class ShmBlocksError(Exception):
    """Base class of all errors of this library."""


class PoolNotFoundError(ShmBlocksError):
    """This node has no pool or queue of that name."""


class PoolExistsError(ShmBlocksError):
    """A living pool or queue has the name."""


class IncompatiblePoolError(ShmBlocksError):
    """The segment has another layout version, or shmblocks did not make it."""


class IncompatibleConfigError(ShmBlocksError):
    """The pool exists, but was created with another config; the message names what differs."""


class DamagedPoolError(ShmBlocksError):
    """The segment holds bytes that no operation of this library leaves behind."""


class PoolPermissionError(ShmBlocksError, PermissionError):
    """The pool belongs to another user, or this user may not make segments."""


class SharedMemoryFullError(ShmBlocksError, MemoryError):
    """The machine, or a limit of this process or its container, cannot give the memory."""


class PoolClosedError(ShmBlocksError):
    """The pool or queue object was closed in this process, or its segment was taken away."""


class MalformedHandleError(ShmBlocksError):
    """Bytes or numbers that cannot be a handle of the pool."""


class MalformedMessageError(ShmBlocksError):
    """A message of a queue that is not of the type that this reader expects."""


class ForeignHandleError(ShmBlocksError):
    """A handle of another pool."""


class StaleHandleError(ShmBlocksError):
    """The allocation that the handle names does not exist any more."""


class InvalidStateError(ShmBlocksError):
    """The operation is not allowed in the allocation's present state."""


class KeyExistsError(ShmBlocksError):
    """The cache has an entry of that key already."""


class PeerDiedError(ShmBlocksError):
    """A process that this one depends on has died."""


class PoolTimeoutError(ShmBlocksError, TimeoutError):
    """A deadline passed; the message names those who are in the way."""


class TooManyParticipantsError(ShmBlocksError):
    """Living processes use every participant slot of the pool or queue."""


class TooManyLeasesError(ShmBlocksError):
    """Every lease slot of the pool is in use."""


class TooManyWaitersError(ShmBlocksError):
    """Every slot of the wait queue is in use."""


class AuthenticationError(ShmBlocksError):
    """The other machine did not prove that it knows the shared secret."""


class TransferError(ShmBlocksError):
    """A transfer between two endpoints ended as Failed."""


class CudaUnavailableError(ShmBlocksError):
    """This process cannot use the GPU, or a call of its driver failed."""


class UnsupportedPlatformError(ShmBlocksError, ImportError):
    """The operating system or processor cannot run shmblocks."""
