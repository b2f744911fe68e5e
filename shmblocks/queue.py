"""`HandleQueue`: handles and other small messages between processes, through shared memory.

    queue = HandleQueue.create("embeddings", message_type=BlockHandle)     # one process
    queue = HandleQueue.attach("embeddings", message_type=BlockHandle)     # others
    queue.put(handle); handle = queue.get(timeout=1.0)

Contract
- Bounded, FIFO, any number of processes and threads on either side. `put`, `get`, timeouts,
  `queue.Full` and `queue.Empty` are those of the standard library's queues, so that it stands in
  wherever one is expected.
- Messages are `bytes`, or msgspec Structs of the one `message_type`; anything else is refused by
  `put`. Nothing is unpickled.
- A process that is killed anywhere loses at most the messages it had in hand, and blocks nobody.
- A malformed message is the error of one `get`; it takes no other message with it.
- After `close`, whoever still waits in this process gets `PoolClosedError`.
- Nobody waiting: no system call but for the lock. Waiting: a short spin, then sleep.
- Whoever leaves last removes it, with what is in it.

What it does not do: keep a message that was taken by a process that then died, or carry tensors.
"""

from __future__ import annotations

import operator
import queue as standard
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, NoReturn, TypeVar, overload

import msgspec

from shmblocks._os.wait import LONGEST_SPIN, Sleeper, deadline_of, seconds_left
from shmblocks._state import lifetime
from shmblocks._state.info import ParticipantInfo
from shmblocks._state.queue_state import FULL, MAX_CAPACITY, MAX_MESSAGE_BYTES, QueueState
from shmblocks._state.shared_segment import ATTACH_POLL
from shmblocks.errors import MalformedMessageError, PoolClosedError, PoolNotFoundError

T = TypeVar("T")
S = TypeVar("S")


class HandleQueue(Generic[T]):
    """A queue that this process takes part in. Make one with `create` or `attach`."""

    def __init__(
        self, state: QueueState, message_type: type[T] | None, spin: float, role: str
    ) -> None:
        """For `create` and `attach`; takes over the state."""
        # Public for the parts of this package; users have no business with it.
        self.state = state
        self._message_type = message_type
        self._spin = spin
        self._role = role
        self._item_type: type = bytes if message_type is None else message_type
        self._decoder = msgspec.msgpack.Decoder(message_type) if message_type else None
        # Told by the next get: there were others with it.
        self._malformed: deque[MalformedMessageError] = deque()
        self._getting = Sleeper(
            state.puts, state.getter_sleeps, state.getter_gives_up, state.has_message, spin
        )
        self._putting = Sleeper(
            state.gets, state.putter_sleeps, state.putter_gives_up, state.has_room, spin
        )
        self._finalizer = lifetime.leave_when_dropped(self, state)
        _open_queues[state.queue_id] = self  # type: ignore[assignment]

    # ---- life --------------------------------------------------------------------------------

    @overload
    @classmethod
    def create(
        cls,
        name: str,
        capacity: int = ...,
        *,
        message_bytes: int = ...,
        message_type: type[S],
        spin: float = ...,
        group: str | None = ...,
        role: str = ...,
    ) -> HandleQueue[S]: ...

    @overload
    @classmethod
    def create(
        cls,
        name: str,
        capacity: int = ...,
        *,
        message_bytes: int = ...,
        message_type: None = ...,
        spin: float = ...,
        group: str | None = ...,
        role: str = ...,
    ) -> HandleQueue[bytes]: ...

    @classmethod
    def create(
        cls,
        name: str,
        capacity: int = 1024,
        *,
        message_bytes: int = 256,
        message_type: type[S] | None = None,
        spin: float = LONGEST_SPIN,
        group: str | None = None,
        role: str = "",
    ) -> HandleQueue[S] | HandleQueue[bytes]:
        """Make a queue of `capacity` messages of up to `message_bytes` bytes each.

        message_type  a msgspec Struct that messages are encoded from and decoded to; None: bytes
        spin          seconds to spin for a message before sleeping; 0: never
        group         name of the Unix group that may use it too; None: this user alone
        role          up to 63 bytes that inspectors and errors show for this process

        Raises `PoolExistsError`, `SharedMemoryFullError`.
        """
        _in_range("capacity", capacity, MAX_CAPACITY)
        _in_range("message_bytes", message_bytes, MAX_MESSAGE_BYTES)
        make = partial(QueueState.create, name, capacity, message_bytes, group, role)
        return _owning(make, message_type, spin, role)

    @overload
    @classmethod
    def attach(
        cls,
        name: str,
        *,
        timeout: float = ...,
        message_type: type[S],
        spin: float = ...,
        role: str = ...,
    ) -> HandleQueue[S]: ...

    @overload
    @classmethod
    def attach(
        cls,
        name: str,
        *,
        timeout: float = ...,
        message_type: None = ...,
        spin: float = ...,
        role: str = ...,
    ) -> HandleQueue[bytes]: ...

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        timeout: float = 0.0,
        message_type: type[S] | None = None,
        spin: float = LONGEST_SPIN,
        role: str = "",
    ) -> HandleQueue[S] | HandleQueue[bytes]:
        """Take part in an existing queue; wait up to `timeout` seconds for it to appear."""
        deadline = deadline_of(timeout)
        while True:
            try:
                make = partial(QueueState.attach, name, role)
                return _owning(make, message_type, spin, role)
            except PoolNotFoundError:
                if seconds_left(deadline) <= 0:
                    raise
            time.sleep(ATTACH_POLL)

    def close(self) -> None:
        """Leave the queue; the last one to leave removes it. Idempotent."""
        # Leave first, so that waiters woken below see a closed queue.
        self.state.leave()
        self._getting.close()
        self._putting.close()
        self._finalizer.detach()

    def __enter__(self) -> HandleQueue[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(
        self,
    ) -> tuple[Callable[..., object], tuple[str, int, type[T] | None, float, str]]:
        how = (self._message_type, self._spin, self._role)
        return (_reattach, (self.name, self.state.queue_id, *how))

    def __copy__(self) -> NoReturn:
        raise TypeError(f"{self!r}: it cannot be copied; attach the queue again, or share this one")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __repr__(self) -> str:
        try:
            state = f"{self.qsize()} of {self.capacity} messages"
        except PoolClosedError:
            state = "closed"
        return f"HandleQueue({self.name!r}, {state})"

    @property
    def name(self) -> str:
        """With its leading slash."""
        return self.state.name

    @property
    def capacity(self) -> int:
        """Messages that it can hold."""
        return self.state.capacity

    @property
    def message_bytes(self) -> int:
        """The longest message, in bytes."""
        return self.state.message_bytes

    @property
    def is_closed(self) -> bool:
        """Whether this process has left it."""
        return self.state.is_closed

    def qsize(self) -> int:
        """Messages in it, of this moment."""
        return self.state.messages

    def empty(self) -> bool:
        """Whether no message is in it, of this moment."""
        return self.qsize() == 0

    def participants(self) -> list[ParticipantInfo]:
        """Everyone attached, and the dead who were not cleared yet."""
        return self.state.participant_infos()

    def full(self) -> bool:
        """Whether it has no room, of this moment."""
        return self.qsize() >= self.capacity

    # ---- putting -----------------------------------------------------------------------------

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """Append a message; `queue.Full` when there is no room (within `timeout` seconds)."""
        message = self._encode(item)
        deadline = deadline_of(timeout) if block and timeout is not None else None
        if self._try_put(message):
            return
        if not block:
            raise standard.Full
        while not self._try_put(message):
            if not self._putting.until_changed(deadline):
                raise standard.Full

    def put_nowait(self, item: T) -> None:
        """`put` that never waits."""
        self.put(item, block=False)

    async def put_async(self, item: T, timeout: float | None = None) -> None:
        """`put` for asyncio; cancelling it leaves no trace."""
        message = self._encode(item)
        deadline = deadline_of(timeout)
        while not self._try_put(message):
            changed = await self._putting.until_changed_async(deadline)
            if not changed and seconds_left(deadline) <= 0:
                raise standard.Full

    def _try_put(self, message: bytes) -> bool:
        core = self.state.core
        if core is not None and core.put(message):
            return True
        wake = self.state.put(message)
        if wake > 0:
            self.state.puts.wake(wake)
        return wake != FULL

    # ---- getting -----------------------------------------------------------------------------

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """The oldest message; `queue.Empty` when there is none (within `timeout` seconds)."""
        return self._decode(self._take(1, block, timeout)[0])

    def get_nowait(self) -> T:
        """`get` that never waits."""
        return self.get(block=False)

    def get_many(self, limit: int, block: bool = True, timeout: float | None = None) -> list[T]:
        """At least one and up to `limit` messages, oldest first, under one lock.

        A malformed one among them is the error of the next get.
        """
        _in_range("limit", limit, MAX_CAPACITY)
        messages = self._take(limit, block, timeout)
        if self._decoder is None:
            return messages  # type: ignore[return-value]
        return self._decode_all(messages)

    def _take(self, limit: int, block: bool, timeout: float | None) -> list[bytes]:
        deadline = deadline_of(timeout) if block and timeout is not None else None
        self._tell_malformed()
        core, spin = self.state.core, 0
        if core is not None and limit == 1:
            # The compiled get spins for a message, too.
            spin = self._getting.budget_ns(deadline) if block else 0
            message = core.get(spin)
            if message is not None:
                return [message]
        messages = self._try_get(limit)
        if messages:
            return messages
        if not block:
            raise standard.Empty
        while self._getting.until_changed(deadline, spin):
            messages = self._try_get(limit)
            if messages:
                return messages
        raise standard.Empty

    async def get_async(self, timeout: float | None = None) -> T:
        """`get` for asyncio; cancelling it takes no message."""
        return self._decode((await self._take_async(1, timeout))[0])

    async def get_many_async(self, limit: int, timeout: float | None = None) -> list[T]:
        """`get_many` for asyncio; cancelling it takes no message."""
        _in_range("limit", limit, MAX_CAPACITY)
        messages = await self._take_async(limit, timeout)
        return messages if self._decoder is None else self._decode_all(messages)  # type: ignore[return-value]

    async def _take_async(self, limit: int, timeout: float | None) -> list[bytes]:
        deadline = deadline_of(timeout)
        self._tell_malformed()
        while True:
            messages = self._try_get(limit)
            if messages:
                return messages
            changed = await self._getting.until_changed_async(deadline)
            if not changed and seconds_left(deadline) <= 0:
                raise standard.Empty

    def _try_get(self, limit: int) -> list[bytes]:
        if not self.state.has_message():
            # No lock taken to see that. Should the words be stale on this processor, the wait that
            # follows looks again under the lock.
            return []
        messages, wake = self.state.get(limit)
        if wake:
            self.state.gets.wake(wake)
        return messages

    # ---- messages ----------------------------------------------------------------------------

    def _encode(self, item: T) -> bytes:
        if not isinstance(item, self._item_type):
            raise TypeError(
                f"item: queue {self.name} expects {self._item_type.__name__}, "
                f"got {type(item).__name__}: see `message_type` of create and attach"
            )
        message: bytes = item if self._decoder is None else _encoder.encode(item)  # type: ignore[assignment]
        if len(message) > self.state.message_bytes:
            raise ValueError(
                f"item: expected at most {self.state.message_bytes} bytes, got {len(message)}; "
                "create the queue with larger message_bytes"
            )
        return message

    def _decode_all(self, messages: list[bytes]) -> list[T]:
        decoded = []
        for message in messages:
            try:
                decoded.append(self._decode(message))
            except MalformedMessageError as error:
                self._malformed.append(error)
        if not decoded:
            self._tell_malformed()
        return decoded

    def _tell_malformed(self) -> None:
        if self._malformed:
            raise self._malformed.popleft()

    def _decode(self, message: bytes) -> T:
        if self._decoder is None:
            return message  # type: ignore[return-value]
        try:
            return self._decoder.decode(message)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedMessageError(
                f"queue {self.name}: expected {self._message_type}, got {message!r}: {error}"
            ) from error


_encoder = msgspec.msgpack.Encoder()


# The queues of this process, by their ids: one that is unpickled again is the same object.
_open_queues: weakref.WeakValueDictionary[int, HandleQueue[object]] = weakref.WeakValueDictionary()


def _owning(
    make: Callable[[], QueueState], message_type: type[S] | None, spin: float, role: str
) -> HandleQueue[S]:
    """The queue object of the state that `make` joins; interrupted anywhere, it has left."""
    state: QueueState | None = None
    try:
        state = make()
        return HandleQueue(state, message_type, spin, role)
    except BaseException:
        if state is not None:
            state.leave()
        raise


def _reattach(
    name: str, queue_id: int, message_type: type[S] | None, spin: float, role: str
) -> HandleQueue[object]:
    """Unpickling: this process's own object, or else attach, if it is still the same queue."""
    there = _open_queues.get(queue_id)
    if there is not None and not there.is_closed:
        return there
    make = partial(QueueState.attach, name, role)
    queue: HandleQueue[object] = _owning(make, message_type, spin, role)
    if queue.state.queue_id != queue_id:
        queue.close()
        raise PoolNotFoundError(
            f"queue {name}: the queue that was sent is gone, another has taken its name"
        )
    return queue


def _in_range(what: str, value: int, largest: int) -> None:
    if not 1 <= operator.index(value) <= largest:
        raise ValueError(f"{what}: expected 1 to {largest}, got {value}")
