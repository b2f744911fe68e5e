"""Any sequence of operations on the cache, by anybody, with deaths: the pool answers as the model.

Everything of `tests/core/test_model.py` happens too. Keys share few buckets, so that chains have
several links; the pool is small, so that allocations evict.
"""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, consumes, multiple, rule

from shmblocks import (
    UNBOUNDED,
    BlockHandle,
    InvalidStateError,
    KeyExistsError,
    Lease,
    StaleHandleError,
    State,
)
from tests.cache import kit
from tests.cache.model import CacheModel
from tests.core import pools
from tests.core.model import Claim
from tests.core.test_model import PHASES, TOTAL, PoolMachineWithDeaths

KEYS = [*kit.same_bucket(3, TOTAL), *(kit.key(number) for number in range(3))]
keys = st.integers(0, len(KEYS) - 1)
Given = tuple[bytes, str, Claim, BlockHandle]


class CacheMachine(PoolMachineWithDeaths):
    """The machine of pools, with keys, claims, tickets and eviction."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.model: CacheModel = CacheModel(TOTAL, pools.BLOCK_SIZE)

    # ---- keys --------------------------------------------------------------------------------

    @rule(
        target=PoolMachineWithDeaths.handles,
        who=st.integers(0, 9),
        blocks=st.integers(1, 3),
        key=keys,
        readers=st.sampled_from([UNBOUNDED, UNBOUNDED, UNBOUNDED, 1, 2]),
        is_held=st.booleans(),
    )
    def put(self, who: int, blocks: int, key: int, readers: int, is_held: bool) -> object:
        """Reserve, and publish under a key."""
        name = self.actor(who)
        pool, size = self.actors[name], blocks * pools.BLOCK_SIZE
        handle = pool.alloc(size)
        made = self.model.alloc(blocks, size, name)
        self.expect(handle, made)
        if handle is None or made is None:
            return multiple()
        hold = 1000.0 if is_held else 0.0
        there = self.model.publish_under(made, size, readers, key, is_held)
        if there is None:
            return pool.publish(handle, readers=readers, key=KEYS[key], hold=hold)
        with pytest.raises(KeyExistsError) as told:
            pool.publish(handle, readers=readers, key=KEYS[key], hold=hold)
        self.expect(cast("BlockHandle", told.value.handle), there)
        return multiple()

    @rule(
        target=PoolMachineWithDeaths.leases,
        who=st.integers(0, 9),
        key=keys,
        count=st.integers(1, 3),
    )
    def get(self, who: int, key: int, count: int) -> object:
        name = self.actor(who)
        claims = [Claim(name, reads=True) for _ in range(count)]
        leases = self.actors[name].get(KEYS[key], leases=count)
        there = self.model.get(key, claims)
        assert (leases is None) == (there is None)
        if leases is None:
            return multiple()
        self.expect(leases[0].handle, there)
        held = [(lease.handle, claim, lease) for lease, claim in zip(leases, claims, strict=True)]
        return multiple(*held)

    @rule(who=st.integers(0, 9), key=keys)
    def touch(self, who: int, key: int) -> None:
        there = self.model.entry(key)
        assert self.actors[self.actor(who)].touch(KEYS[key]) == (there is not None)
        if there is not None:
            there.used = self.model.now()

    @rule(who=st.integers(0, 9), key=keys)
    def drop(self, who: int, key: int) -> None:
        there = self.model.entry(key)
        assert self.actors[self.actor(who)].drop(KEYS[key]) == (there is not None)
        if there is not None:
            self.model.free(there.allocation)

    # ---- claims ------------------------------------------------------------------------------

    @rule(who=st.integers(0, 9), key=keys)
    def want(self, who: int, key: int) -> None:
        name = self.actor(who)
        answer = self.actors[name].claim(KEYS[key])
        assert answer.state == self.model.want(key, name)
        if answer.state == "busy":
            assert answer.owner == self.actors[self.model.claims[key]].participant

    @rule(who=st.integers(0, 9), key=keys)
    def give_up(self, who: int, key: int) -> None:
        name = self.actor(who)
        is_mine = self.model.claims.get(key) == name
        assert self.actors[name].end_claim(KEYS[key]) == is_mine
        if is_mine:
            del self.model.claims[key]

    # ---- tickets -----------------------------------------------------------------------------

    @rule(target=tickets, held=consumes(PoolMachineWithDeaths.leases))
    def give(self, held: tuple[BlockHandle, Claim, Lease]) -> object:
        handle, claim, lease = held
        known = self.model.live.get(handle.generation)
        self.graves.append(lease)
        if claim.holder not in self.actors:
            return multiple()
        if known is None or not any(each is claim for each in known.claims):
            return self.refused(InvalidStateError, lease.ticket)
        if not claim.reads:
            self.refused(InvalidStateError, lease.ticket)
            lease.release()
            self.model.release(known, claim)
            return multiple()
        return lease.ticket(), claim.holder, claim, handle

    @rule(target=PoolMachineWithDeaths.leases, given=tickets, who=st.integers(0, 9))
    def adopt(self, given: Given, who: int) -> object:
        ticket, giver, claim, handle = given
        name = self.actor(who)
        known = self.model.live.get(handle.generation)
        travels = (
            known is not None
            and claim.holder == giver
            and any(each is claim for each in known.claims)
        )
        if not travels or known is None:
            return self.refused(StaleHandleError, lambda: self.actors[name].adopt(ticket))
        adopted = Claim(name, reads=True)
        known.claims[known.claims.index(claim)] = adopted
        claim.holder = ""
        return handle, adopted, self.actors[name].adopt(ticket)

    @rule(given=tickets, who=st.integers(0, 9))
    def revoke(self, given: Given, who: int) -> None:
        ticket, giver, claim, handle = given
        name = self.actor(who)
        known = self.model.live.get(handle.generation)
        is_mine = (
            known is not None
            and giver == name
            and claim.holder == giver
            and any(each is claim for each in known.claims)
        )
        assert self.actors[name].revoke(ticket) == is_mine
        if is_mine and known is not None:
            self.model.release(known, claim)

    # ---- what always holds -------------------------------------------------------------------

    def everything_is_accounted_for(self) -> None:
        super().everything_is_accounted_for()
        there = {key: self.model.entry(key) for key in range(len(KEYS))}
        for key, entry in there.items():
            found = self.pool.find(KEYS[key])
            self.expect(
                None if found is None else found.handle,
                None if entry is None else entry.allocation,
            )
        stats = self.pool.cache_stats()
        assert stats.entries == sum(entry is not None for entry in there.values())
        assert stats.evictions == self.model.evicted
        assert stats.claims == len(self.model.claims)
        states = {info.generation: info.state for info in self.pool.allocations()}
        for entry in there.values():
            if entry is not None:
                assert states[entry.allocation.generation] in (State.PUBLISHED, State.LEASED)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=30, stateful_step_count=50, phases=PHASES)
