"""Pools that get the same calls: one by the compiled core, one by Python, one by both in turn.

After each call the state of all is the same, byte for byte, but for moments, names, and what says
who was inside last.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from shmblocks import BlockHandle, BlockPool, Lease, PoolConfig
from shmblocks._state.counters import BUCKETS, Counter, Histogram
from shmblocks._state.layout import (
    COUNTER_BYTES,
    H_CREATED,
    H_LOCK_HOLDER,
    H_UNCLAIMED,
    L_OPENED,
    LEASE_WORDS,
    PARTICIPANT_WORDS,
    R_CREATED,
    R_HOLD,
    R_PUBLISHED,
    R_USED,
    RECORD_WORDS,
    WORD,
)
from shmblocks.channel import Channel

CONFIG = PoolConfig(
    total_tokens=150 * 8,
    block_size=8,
    max_leases=12,
    max_participants=4,
    channels=2,
    channel_slots=2 * 24,
)
CAPACITY = 8
POOL_ID = 2

Outcome = tuple[str, str]
Call = Callable[["Twin"], object]


class Twin:
    """One pool, and what this process holds of it, in the same order as its twins."""

    def __init__(self, pool: BlockPool, how: str) -> None:
        self.pool = pool
        self.how = how
        self.core = pool.state.core
        self.channels = [pool.channel(name, CAPACITY) for name in ("one", "two")]
        self.reserved: list[BlockHandle] = []
        self.published: list[BlockHandle] = []
        self.leases: list[Lease] = []
        self.stale: list[BlockHandle] = []
        self.use_core(how == "core")

    def use_core(self, wanted: bool) -> None:
        self.pool.state.core = self.core if wanted else None
        for channel in self.channels:
            channel._core = self.pool.state.core

    def words(self) -> list[int]:
        """The state without what may differ."""
        state = self.pool.state
        layout = state.layout
        words: list[int] = state.segment.words[: layout.state_bytes // WORD].tolist()
        words[H_UNCLAIMED] = bool(words[H_UNCLAIMED])
        for index in (POOL_ID, H_CREATED, H_LOCK_HOLDER):
            words[index] = 0
        _mask_counters(words, layout.counters // WORD)
        # The log of the last change has moments in it; the journal's first word has none.
        _zero(words, layout.journal // WORD + 1, layout.journal_bytes // WORD - 1)
        _zero(words, layout.participants // WORD, CONFIG.max_participants * PARTICIPANT_WORDS)
        first = layout.record_word(0)
        for moment in (R_CREATED, R_PUBLISHED, R_HOLD, R_USED):
            _zero(words, first + moment, layout.total_blocks, RECORD_WORDS)
        _zero(words, layout.leases // WORD + L_OPENED, CONFIG.max_leases, LEASE_WORDS)
        return words

    def do(self, call: Call) -> Outcome:
        """What came of a call: its result or its error, without what names the pool."""
        try:
            result = call(self)
        except Exception as error:  # noqa: BLE001 - compared with the twins'
            return type(error).__name__, self._plain(str(error))
        return "", self._plain(repr(result))

    def _plain(self, text: str) -> str:
        text = text.replace(str(self.pool.pool_id), "ID").replace(self.pool.name, "NAME")
        return re.sub(r"0x[0-9a-f]+|[\d.]+ m?s\b", "", text)


def _zero(words: list[int], first: int, count: int, step: int = 1) -> None:
    words[first : first + count * step : step] = [0] * count


def _mask_counters(words: list[int], first: int) -> None:
    """How long something took is not compared, but how often it was observed is."""
    at = first + Histogram.PUBLISH_TO_OPEN
    words[at] = sum(words[at + 1 : at + 1 + BUCKETS])
    _zero(words, at + 1, BUCKETS)
    _zero(words, first + Histogram.LOCK_HELD, 1 + BUCKETS)
    assert Counter.LOCK_RECOVERIES < COUNTER_BYTES // WORD


class Twins:
    """All of them, driven by one source of chance."""

    def __init__(self, pools: list[BlockPool], chance: random.Random) -> None:
        kinds = ("core", "python", "both")
        self.each = [Twin(pool, how) for pool, how in zip(pools, kinds, strict=True)]
        self.chance = chance

    @property
    def first(self) -> Twin:
        return self.each[0]

    def do(self, call: Call) -> None:
        """The same call on all; then everything is equal."""
        self.each[2].use_core(self.chance.random() < 0.5)
        outcomes = [twin.do(call) for twin in self.each]
        assert outcomes[0] == outcomes[1] == outcomes[2], outcomes
        states = [twin.words() for twin in self.each]
        for other in states[1:]:
            if states[0] != other:
                pairs = enumerate(zip(states[0], other, strict=True))
                different = [at for at, (one, two) in pairs if one != two]
                raise AssertionError(f"words {different} differ after {outcomes[0]}")

    # ---- one random call ---------------------------------------------------------------------

    def step(self) -> None:
        name = self.chance.choice(_STEPS)
        getattr(self, f"_{name}")()

    def _pick(self, things: list[object] | list[BlockHandle] | list[Lease]) -> int:
        return self.chance.randrange(len(things)) if things else -1

    def _alloc(self) -> None:
        tokens = self.chance.choice([1, 7, 8, 9, 40, 100, 530, self.chance.randrange(1, 300)])
        request = self.chance.choice([None, "", "r", "é" * 30, "é" * 40, "\udc80"])

        def call(twin: Twin) -> object:
            handle = twin.pool.alloc(tokens, req_id=request)
            if handle is not None:
                twin.reserved.append(handle)
            return handle

        self.do(call)

    def _alloc_blocks(self) -> None:
        blocks, spare = self.chance.randrange(1, 70), self.chance.randrange(0, 9)

        def call(twin: Twin) -> object:
            handle = twin.pool.alloc_blocks(blocks, blocks * 8 - spare + 4)
            if handle is not None:
                twin.reserved.append(handle)
            return handle

        self.do(call)

    def _grow(self) -> None:
        at, more = self._pick(self.first.reserved), self.chance.randrange(1, 20)

        def call(twin: Twin) -> object:
            handle = twin.reserved[at]
            grown = twin.pool.grow(handle, handle.num_tokens + more)
            twin.reserved[at] = grown or handle
            return grown

        if at >= 0:
            self.do(call)

    def _publish(self) -> None:
        at, readers = self._pick(self.first.reserved), self.chance.choice([1, 1, 2, 3, 1 << 48])
        shorter, key = (
            self.chance.random() < 0.3,
            self._key() if self.chance.random() < 0.3 else None,
        )
        # With 0.0 the next allocation without room evicts it.
        held = self.chance.choice([0.0, 1000.0])

        def call(twin: Twin) -> object:
            handle = twin.reserved.pop(at)
            tokens = max(1, handle.num_tokens - 3) if shorter else None
            hold = held if key else 0.0
            published = twin.pool.publish(
                handle, readers=readers, num_tokens=tokens, key=key, hold=hold
            )
            twin.published += [published] * min(readers, 3)
            return published

        if at >= 0:
            self.do(call)

    def _publish_on_a_stream(self) -> None:
        """As a pool on a GPU does: somebody will say when it is ready, maybe after it is opened."""
        at, readers = self._pick(self.first.reserved), self.chance.choice([1, 2])
        is_late = self.chance.random() < 0.5

        def call(twin: Twin) -> object:
            handle, state = twin.reserved.pop(at), twin.pool.state
            state.publish(handle, handle.num_tokens, readers, on_stream=True)
            opened = state.open(handle) if is_late else None
            state.segment.words[state.layout.ready_word(handle.start_block)] = handle.generation
            if opened is not None:
                state.release(opened.key)
            twin.published += [handle] * (readers - is_late)
            return opened and (opened.is_ready, opened.key.slot)

        if at >= 0:
            self.do(call)

    def _publish_by_name(self) -> None:
        """To this process alone: such readers are Python's, and the core must see that."""
        at, again = self._pick(self.first.reserved), self.chance.random() < 0.3

        def call(twin: Twin) -> object:
            me = twin.pool.participant
            assert me is not None
            published = twin.pool.publish(twin.reserved.pop(at), readers=[me])
            if again:
                twin.pool.add_reader(published, me)
            twin.published += [published] * (1 + again)
            return published

        if at >= 0:
            self.do(call)

    def _key(self) -> bytes:
        return bytes([self.chance.randrange(5)]) * self.chance.choice([16, 32])

    def _send(self) -> None:
        from_published = self.chance.random() < 0.3
        things = self.first.published if from_published else self.first.reserved
        at, message = self._pick(things), b"m" * self.chance.choice([0, 1, 7, 8, 63, 64])
        which = self.chance.choice([[0], [0], [1], [0, 1]])

        def call(twin: Twin) -> object:
            handle = (twin.published if from_published else twin.reserved).pop(at)
            channels: list[Channel] = [twin.channels[index] for index in which]
            try:
                if len(channels) == 1:
                    return channels[0].send(handle, message=message, timeout=0.0)
                return twin.pool.send(channels, handle, message=message, timeout=0.0)
            except Exception:
                twin.stale.append(handle)
                raise

        if at >= 0:
            self.do(call)

    def _receive(self) -> None:
        which, limit = self.chance.randrange(2), self.chance.choice([0, 1, 3])

        def call(twin: Twin) -> object:
            channel = twin.channels[which]
            leases = channel.receive_many(limit, 0.0) if limit else [channel.receive(0.0)]
            twin.leases += leases
            return [(lease.handle, lease.message) for lease in leases]

        self.do(call)

    def _open(self) -> None:
        stale = self.first.stale
        from_stale = bool(stale) and self.chance.random() < 0.2
        at = self._pick(stale if from_stale else self.first.published)

        def call(twin: Twin) -> object:
            handle = twin.stale[at] if from_stale else twin.published.pop(at)
            lease = twin.pool.open(handle)
            twin.leases.append(lease)
            return lease

        if at >= 0:
            self.do(call)

    def _open_for_write(self) -> None:
        at = self._pick(self.first.reserved)

        def call(twin: Twin) -> object:
            lease = twin.pool.open_for_write(twin.reserved[at])
            twin.leases.append(lease)
            return lease

        if at >= 0 and self.chance.random() < 0.3:
            self.do(call)

    def _release(self) -> None:
        at, unread = self._pick(self.first.leases), self.chance.random() < 0.1

        def call(twin: Twin) -> object:
            lease = twin.leases.pop(at)
            lease.give_back() if unread else lease.release()
            lease.release()
            return lease

        if at >= 0:
            self.do(call)

    def _free(self) -> None:
        from_published = self.chance.random() < 0.4
        at = self._pick(self.first.published if from_published else self.first.reserved)

        def call(twin: Twin) -> object:
            handle = (twin.published if from_published else twin.reserved).pop(at)
            twin.stale.append(handle)
            twin.pool.free(handle)
            return handle

        if at >= 0:
            self.do(call)

    def _stale(self) -> None:
        at = self._pick(self.first.stale)
        what = self.chance.choice(["free", "publish", "view", "open", "send"])

        def call(twin: Twin) -> object:
            handle = twin.stale[at]
            if what == "send":
                return twin.channels[0].send(handle, timeout=0.0)
            found = getattr(twin.pool, what)(handle)
            if isinstance(found, Lease):
                twin.leases.append(found)
            return found

        if at >= 0:
            self.do(call)

    def _get(self) -> None:
        key, tokens = self._key(), self.chance.choice([None, None, 8, 40])
        leases = self.chance.choice([1, 1, 2])

        def call(twin: Twin) -> object:
            found = twin.pool.get(key, num_tokens=tokens, leases=leases)
            twin.leases += found or []
            return found

        self.do(call)

    def _find(self) -> None:
        key = self._key()
        self.do(lambda twin: twin.pool.find(key))

    def _drop(self) -> None:
        key = self._key()
        self.do(lambda twin: twin.pool.drop(key))

    def _view(self) -> None:
        at = self._pick(self.first.reserved)
        if at >= 0:
            self.do(lambda twin: twin.pool.view(twin.reserved[at]).start_token)

    def _odd(self) -> None:
        """Arguments that are refused."""
        which = self.chance.randrange(5)

        def call(twin: Twin) -> object:
            if which == 0:
                return twin.pool.alloc(0)
            if which == 1:
                return twin.pool.alloc(1 << 62)
            if which == 2:
                return twin.pool.alloc(1, timeout=-1.0)
            if which == 3:
                return twin.channels[0].send("handle")  # type: ignore[arg-type]
            return twin.channels[0].receive(timeout=-1.0)

        self.do(call)

    def end(self) -> None:
        while self.first.leases:
            self._release()
        for twin in self.each:
            assert twin.pool.check() == []


_STEPS = (
    "publish_by_name",
    "publish_on_a_stream",
    *("alloc", "alloc", "alloc", "alloc_blocks", "grow", "publish", "publish", "send", "send"),
    *("send", "receive", "receive", "open", "open", "release", "release", "release", "release"),
    *("free", "stale", "get", "get", "find", "drop", "view", "odd", "open_for_write"),
)
