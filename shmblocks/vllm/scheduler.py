"""The scheduler's side: what is in the pool is promised to the workers, and the promise is a lease.

    in each pass, for each request with media:
      is_available        whether it may be scheduled: its items are there, or can be encoded
      has                 an item is in the pool: take a lease for each rank, and promise it
      after_alloc         the item is scheduled: the promise goes into the plan; or claim it
    take_plan             the step's plan goes to the workers; promises that nobody took end
    after_free, finished  the request is past its item, or over

vLLM cannot take a promise back: an item that `has` has reported and that the worker does not find
stops the engine. So the leases are taken here and travel as tickets; what is promised cannot be
evicted, and needs no message back from a worker.

A request without media (its client has the metadata that an encoder reported) must find its item
when it is scheduled, or the engine stops as well. Its leases are taken before, and kept until the
item is scheduled. If there are none to be had the request fails, and its client encodes anew.

Contract
- No method waits, and none raises. The pool's lock is given up after `LOCK_TIMEOUT` as a miss.
- Every lease that is taken here is given to a worker, given back, or ends with this process.

An item that another node owns is asked of that node, once for each request (`fetching.py`). The
request waits for it as for an instance of this node that encodes.

What it does not do: read or write what is in the pool (`worker.py`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from shmblocks.cache import TensorCache, TensorTickets
from shmblocks.errors import PoolTimeoutError, ShmBlocksError
from shmblocks.vllm.identity import Identity
from shmblocks.vllm.plan import Save, StepPlan
from shmblocks.vllm.tally import Tally

if TYPE_CHECKING:
    from shmblocks.vllm.fetching import Fetches

# Seconds that a hook waits for the pool's lock. Shorter: misses under load. Longer: a process that
# was stopped inside holds up every request of the engine for as long.
LOCK_TIMEOUT = 2e-3
# Seconds after which a ticket that no worker took is revoked. Shorter: a worker that is late by a
# long step finds its promise broken. Longer: what a failed step left is kept from eviction.
TICKET_SECONDS = 60.0
# Plans whose tickets are looked after in one pass. More: a pass takes longer (10 us a ticket).
REVOKED_AT_ONCE = 2
# Seconds after which what a stream is to complete is asked after: is its producer dead?
IN_FLIGHT_PATIENCE = 0.05

_log = logging.getLogger("vllm.ec.shmblocks")

Who = tuple[str, str]  # a request, and the identifier of one of its items


class Position(Protocol):
    """Of vLLM's `PlaceholderRange`."""

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...

    def get_num_embeds(self) -> int: ...


class Feature(Protocol):
    """Of vLLM's `MultiModalFeatureSpec`."""

    @property
    def identifier(self) -> str: ...

    @property
    def modality(self) -> str: ...

    @property
    def data(self) -> Mapping[str, Any] | None: ...

    @property
    def mm_position(self) -> Position: ...


class RequestLike(Protocol):
    """Of vLLM's `Request`."""

    @property
    def request_id(self) -> str: ...

    @property
    def num_preemptions(self) -> int: ...

    @property
    def mm_features(self) -> Sequence[Feature]: ...


P = ParamSpec("P")
R = TypeVar("R")


def _impatient(
    hook: Callable[Concatenate[SchedulerSide, P], R],
) -> Callable[Concatenate[SchedulerSide, P], R]:
    """A hook in which the pool's lock is waited for `LOCK_TIMEOUT` seconds only."""

    @functools.wraps(hook)
    def with_less_patience(self: SchedulerSide, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._pool.lock_timeout(LOCK_TIMEOUT):
            return hook(self, *args, **kwargs)

    return with_less_patience


class SchedulerSide:
    """One instance's scheduler. Borrows the cache, whose pool must be this side's own."""

    def __init__(
        self,
        cache: TensorCache,
        identity: Identity,
        placeholder_fields: Callable[[str], set[str]],
        *,
        is_producer: bool,
        is_consumer: bool,
        ranks: int,
        wait_seconds: float,
        hold_seconds: float,
        fetches: Fetches | None = None,
    ) -> None:
        """`ranks`: workers that load each item. `placeholder_fields`: of a modality, the keys of a
        feature's data that are no media. `fetches`: from other nodes; closed with this."""
        self._cache = cache
        self._pool = cache.pool
        self._identity = identity
        self._placeholder_fields = placeholder_fields
        self._is_producer = is_producer
        self._is_consumer = is_consumer
        self._ranks = ranks
        self._wait_seconds = wait_seconds
        self._hold_seconds = hold_seconds
        self._fetches = fetches
        self.tally = Tally()
        self._plan = StepPlan()
        # Rows that an item must have, by identifier, as the requests of this pass say.
        self._rows: dict[str, int] = {}
        # Leases for what was promised in this pass, and for requests without media.
        self._promised: dict[str, TensorTickets] = {}
        self._held: dict[Who, TensorTickets] = {}
        # Items that were scheduled for a request, at its so-and-so-many-th preemption.
        self._served: dict[Who, int] = {}
        # Since when a request waits, monotonic; None: it has given up.
        self._waiting: dict[Who, float | None] = {}
        # Whose item was asked of the node that owns it.
        self._asked: set[Who] = set()
        self._lost: set[str] = set()
        # What the engine's own encoder cache holds, or is going to.
        self._in_engine: set[str] = set()
        self._given: deque[tuple[float, list[bytes]]] = deque()
        self._to_revoke: list[bytes] = []

    @property
    def _encodes_only(self) -> bool:
        return self._is_producer and not self._is_consumer

    def _key(self, identifier: str) -> bytes:
        return self._identity.key(identifier, self._pool.epoch)

    # ---- before a request is scheduled ---------------------------------------------------------

    @_impatient
    def is_available(self, request: RequestLike, num_computed: int) -> bool:
        """Whether every item behind `num_computed` tokens can be had; False: not in this pass."""
        is_available = True
        for feature in request.mm_features:
            position = feature.mm_position
            if position.offset + position.length <= num_computed:
                continue
            rows = self._rows[feature.identifier] = position.get_num_embeds()
            if not self._is_item_available(request, feature, rows):
                is_available = False
        return is_available

    def _is_item_available(self, request: RequestLike, feature: Feature, rows: int) -> bool:
        who = (request.request_id, feature.identifier)
        if who in self._held or feature.identifier in self._plan.loads:
            return True
        if self._served.get(who) == request.num_preemptions:
            return True  # the engine keeps it until the request is past it
        needs = self._is_consumer and not self._has_media(feature)
        try:
            if not self._identity.may_share(feature.identifier):
                return not needs or self._lose(who, "its identifier is no content hash")
            return self._is_there_or_to_be_encoded(who, rows, needs)
        except PoolTimeoutError:
            self.tally.add("lock_timeouts")
            return not needs  # one without media asks again in the next pass
        except ShmBlocksError as error:
            _log.warning("%s: %s", feature.identifier, str(error))
            return not needs or self._lose(who, str(error))

    def _is_there_or_to_be_encoded(self, who: Who, rows: int, needs: bool) -> bool:
        identifier = who[1]
        key = self._key(identifier)
        found = self._pool.find(key)
        if found is None or not found.is_ready:
            is_here = identifier in self._in_engine and not needs
            if not is_here and found is None:
                self._ask_owner(who, key)
            if not is_here and self._waits(who, key, is_in_flight=found is not None):
                return False
        self._end_wait(who)
        if needs:
            return self._hold(who, key, rows)
        if found is None and self._encodes_only and identifier in self._in_engine:
            # It will not be encoded again here, and a consumer is about to ask for it.
            self._plan.republish[identifier] = key
        return True

    def _ask_owner(self, who: Who, key: bytes) -> None:
        """Have an item fetched, if another node owns it. Once: a request that does not find it then
        goes on without it, however long it waits for its turn."""
        if self._fetches is not None and who not in self._asked:
            self._asked.add(who)
            self._fetches.begin(key)

    def _is_under_way(self, key: bytes) -> bool:
        """Whether another instance encodes it, or it is being fetched."""
        if self._fetches is not None and self._fetches.is_under_way(key):
            return True
        return self._pool.claimant(key) not in (None, self._pool.participant)

    def _waits(self, who: Who, key: bytes, *, is_in_flight: bool) -> bool:
        """Whether to wait on for one who encodes or fetches it."""
        if is_in_flight:
            since = self._waiting.get(who)
            if since is not None and time.monotonic() - since > IN_FLIGHT_PATIENCE:
                is_in_flight = self._is_still_in_flight(key)
        if not is_in_flight and not self._is_under_way(key):
            return False
        now = time.monotonic()
        if who not in self._waiting:
            self.tally.add("waits")
            self._waiting[who] = now
        since = self._waiting[who]
        if since is None:
            return False
        if now - since < self._wait_seconds:
            return True
        self.tally.add("wait_seconds", now - since)
        self._waiting[who] = None
        _log.warning(
            "request %s: waited %.1f s for item %s, which another instance encodes or a node is to "
            "send; going on without it",
            *(who[0], now - since, who[1]),
        )
        return False

    def _is_still_in_flight(self, key: bytes) -> bool:
        """Ask whether what a stream is to complete will be: `claim` drops what the dead left."""
        answer = self._pool.claim(key)
        if answer.state == "mine":
            self._pool.end_claim(key, answer)
        return answer.state == "ready"

    def _end_wait(self, who: Who) -> None:
        since = self._waiting.get(who)
        if since is not None:
            self.tally.add("wait_seconds", time.monotonic() - since)
            del self._waiting[who]

    def _has_media(self, feature: Feature) -> bool:
        """Whether the encoder could run: there is more than the metadata of a placeholder."""
        if not feature.data:
            return True  # the worker has it in its own processor cache
        metadata = self._placeholder_fields(feature.modality)
        return any(
            element.data is not None
            for name, element in feature.data.items()
            if name not in metadata
        )

    def _hold(self, who: Who, key: bytes, rows: int) -> bool:
        """Take the leases of a request that cannot encode its item; without them it is lost."""
        found = self._take(key, rows)
        if found is None:
            return self._lose(who, "it is not in the pool any more")
        self._held[who] = found
        return True

    def _lose(self, who: Who, why: str) -> bool:
        """The request has neither media nor item: it fails. Always False."""
        if who[0] not in self._lost:
            self.tally.add("lost")
            _log.warning("request %s fails: item %s has no media, and %s", who[0], who[1], why)
        self._lost.add(who[0])
        return False

    def take_lost(self) -> set[str]:
        """Requests that are to fail, once."""
        lost, self._lost = self._lost, set()
        return lost

    # ---- promises ------------------------------------------------------------------------------

    @_impatient
    def has(self, identifier: str) -> bool:
        """Whether the item is in the pool; True is a promise, with the leases to keep it."""
        if identifier in self._promised:
            return True
        if not self._identity.may_share(identifier):
            return False
        found: TensorTickets | None = None
        try:
            found = self._take(self._key(identifier), self._rows.get(identifier))
        except PoolTimeoutError:
            self.tally.add("lock_timeouts")
        except ShmBlocksError as error:
            _log.warning("%s: %s", identifier, str(error))
        if found is None:
            found = self._take_held(identifier)
        if found is None:
            return False
        self._promised[identifier] = found
        return True

    def _take(self, key: bytes, rows: int | None) -> TensorTickets | None:
        """A lease for each rank on an item of so many rows (None: any); None: a miss."""
        found = self._cache.get_tickets(key, leases=self._ranks)
        if found is None or rows is None or found.shape[:1] == (rows,):
            return found
        self.tally.add("mismatches")
        _log.warning(
            "an item of shape %s is in the pool where %d rows are expected: a uuid that was used "
            "for two contents; it is encoded here",
            *(list(found.shape), rows),
        )
        self._revoke(found.tickets)
        return None

    def _take_held(self, identifier: str) -> TensorTickets | None:
        """What a request without media holds, when nothing else is to be had."""
        for who in self._held:
            if who[1] == identifier:
                return self._held.pop(who)
        return None

    @_impatient
    def after_alloc(self, request: RequestLike, index: int) -> None:
        """The engine has made room for an item: it is to be loaded, or encoded."""
        identifier = request.mm_features[index].identifier
        who = (request.request_id, identifier)
        self._in_engine.add(identifier)
        self._served[who] = request.num_preemptions
        self._let_go(who)
        found = self._promised.pop(identifier, None)
        if found is not None:
            self.tally.add("hits")
            # An encode-only instance loads it as well: its own cache counts it as there now.
            self._plan.loads[identifier] = found.tickets
            return
        self.tally.add("misses")
        if self._is_producer and self._identity.may_share(identifier):
            self._claim(identifier)

    def _claim(self, identifier: str) -> None:
        key = self._key(identifier)
        try:
            answer = self._pool.claim(key)
        except ShmBlocksError:
            self._plan.saves[identifier] = Save(key, None)
            return
        if answer.state != "ready":  # busy: both encode, and the first one to publish wins
            claim = answer if answer.state == "mine" else None
            self._plan.saves[identifier] = Save(key, claim)

    @_impatient
    def take_plan(self, freed: Sequence[str]) -> StepPlan:
        """What the workers are to do in this step. `freed`: items that left the engine's cache."""
        for found in self._promised.values():
            self._revoke(found.tickets)  # promised, then not scheduled
        self._promised.clear()
        self._rows.clear()
        if self._fetches is not None:
            self._fetches.count_in(self.tally)
        self._in_engine.difference_update(freed)
        plan, self._plan = self._plan, StepPlan()
        now = time.monotonic()
        tickets = [ticket for load in plan.loads.values() for ticket in load]
        if tickets:
            self._given.append((now, tickets))
        late, self._to_revoke = self._to_revoke, []
        self._revoke(late)
        for _ in range(REVOKED_AT_ONCE):
            if self._given and now - self._given[0][0] > TICKET_SECONDS:
                self._revoke(self._given.popleft()[1])
        return plan

    def _revoke(self, tickets: Sequence[bytes]) -> None:
        """End the leases that no worker has taken; what fails is tried again in the next pass."""
        for ticket in tickets:
            try:
                self._pool.revoke(ticket)
            except ShmBlocksError:
                self._to_revoke.append(ticket)

    # ---- after a request -----------------------------------------------------------------------

    @_impatient
    def after_free(self, request: RequestLike, index: int) -> None:
        """The request is past one of its items."""
        self._forget((request.request_id, request.mm_features[index].identifier))

    @_impatient
    def finished(self, request: RequestLike) -> None:
        """The request is over."""
        for feature in request.mm_features:
            self._forget((request.request_id, feature.identifier))

    def _forget(self, who: Who) -> None:
        self._served.pop(who, None)
        self._end_wait(who)
        self._waiting.pop(who, None)
        self._asked.discard(who)
        self._let_go(who)

    def _let_go(self, who: Who) -> None:
        held = self._held.pop(who, None)
        if held is not None:
            self._revoke(held.tickets)

    @_impatient
    def may_announce(self, identifier: str) -> bool:
        """Whether a client may be told that the item need not be sent: it is in the pool, and an
        encode-only instance holds it there for as long as it was configured to."""
        if not self._identity.may_share(identifier):
            return False
        try:
            hold = self._hold_seconds if self._encodes_only else 0.0
            return self._pool.touch(self._key(identifier), hold=hold)
        except ShmBlocksError:
            return False

    def close(self) -> None:
        """Give everything back, and leave the pool. Idempotent."""
        if self._fetches is not None:
            self._fetches.close()
        with contextlib.suppress(ShmBlocksError):
            self._pool.close()
