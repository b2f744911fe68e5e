"""Any sequence of operations, by anybody, with deaths: the pool answers exactly as the model.

Participants are attachments of this one process: what death is to the others (their locks fall) is
done to them without a process. Some steps fork a real child that takes things and kills itself.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from shmblocks import BlockHandle, BlockPool, InvalidStateError, Lease, StaleHandleError, State
from tests.core import pools
from tests.core.model import Allocation, Claim, Model
from tests.support import naming

TOTAL = 11
LARGEST = 3
Held = tuple[BlockHandle, Claim, Lease]

tokens = st.integers(1, TOTAL * pools.BLOCK_SIZE)
few_tokens = st.integers(1, LARGEST * pools.BLOCK_SIZE)


class PoolMachine(RuleBasedStateMachine):
    """One participant that never dies."""

    handles = Bundle("handles")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        name = naming.new_pool_name()
        self.pool = pools.create(name, pools.tiny(TOTAL, max_leases=64, max_participants=64))
        self.model = Model(TOTAL, pools.BLOCK_SIZE)
        self.actors: dict[str, BlockPool] = {"first": self.pool}
        # The dead are kept, so that nothing of theirs is collected before its time.
        self.graves: list[object] = []

    def actor(self, number: int) -> str:
        """Some participant that lives."""
        names = sorted(self.actors)
        return names[number % len(names)]

    def expect(self, handle: BlockHandle | None, model: Allocation | None) -> None:
        assert (handle is None) == (model is None)
        if handle is not None and model is not None:
            expected = (model.start, model.blocks, model.tokens, model.generation)
            got = (handle.start_block, handle.num_blocks, handle.num_tokens, handle.generation)
            assert got == expected

    # ---- allocating --------------------------------------------------------------------------

    @rule(target=handles, who=st.integers(0, 9), num_tokens=few_tokens | tokens)
    def alloc(self, who: int, num_tokens: int) -> object:
        name = self.actor(who)
        handle = self.actors[name].alloc(num_tokens, name)
        blocks = -(-num_tokens // pools.BLOCK_SIZE)
        self.expect(handle, self.model.alloc(blocks, num_tokens, name))
        return multiple() if handle is None else handle

    @rule(target=handles, who=st.integers(0, 9))
    def alloc_default(self, who: int) -> object:
        name = self.actor(who)
        handle = self.actors[name].alloc_default()
        self.expect(handle, self.model.alloc(2, 2 * pools.BLOCK_SIZE, name))
        return multiple() if handle is None else handle

    @rule(target=handles, who=st.integers(0, 9), blocks=st.integers(1, 4), spare=st.integers(0, 15))
    def alloc_blocks(self, who: int, blocks: int, spare: int) -> object:
        name = self.actor(who)
        num_tokens = max(1, blocks * pools.BLOCK_SIZE - spare)
        handle = self.actors[name].alloc_blocks(blocks, num_tokens)
        self.expect(handle, self.model.alloc(blocks, num_tokens, name))
        return multiple() if handle is None else handle

    @rule(num_tokens=tokens)
    def fake(self, num_tokens: int) -> None:
        fake = self.pool.alloc(num_tokens, fake=True)
        assert fake is not None
        assert fake.start_block == 0
        self.pool.free(fake)

    @rule(target=handles, handle=handles, who=st.integers(0, 9), more=st.integers(0, 12))
    def grow(self, handle: BlockHandle, who: int, more: int) -> object:
        pool = self.actors[self.actor(who)]
        known = self.model.knows(handle)
        num_tokens = handle.num_tokens + more
        if known is None:
            return self.refused(StaleHandleError, lambda: pool.grow(handle, num_tokens))
        if known.state is not State.RESERVED:
            return self.refused(InvalidStateError, lambda: pool.grow(handle, num_tokens))
        grown = pool.grow(handle, num_tokens)
        self.expect(grown, known if self.model.grow(known, num_tokens) else None)
        return multiple() if grown is None else grown

    def refused(self, error: type[Exception], call: Callable[[], object]) -> object:
        with pytest.raises(error):
            call()
        return multiple()

    @rule(handle=handles, who=st.integers(0, 9))
    def free(self, handle: BlockHandle, who: int) -> None:
        pool = self.actors[self.actor(who)]
        known = self.model.knows(handle, exactly=False)
        if known is None or known.state is State.DRAINING:
            self.refused(StaleHandleError, lambda: pool.free(handle))
        else:
            pool.free(handle)
            self.model.free(known)

    # ---- publishing and reading --------------------------------------------------------------

    @rule(
        target=handles,
        handle=handles,
        who=st.integers(0, 9),
        readers=st.integers(1, 3),
        shorter=st.integers(0, 2),
    )
    def publish(self, handle: BlockHandle, who: int, readers: int, shorter: int) -> object:
        pool = self.actors[self.actor(who)]
        num_tokens = max(1, handle.num_tokens - shorter)
        known = self.model.knows(handle)
        if known is None:
            return self.refused(StaleHandleError, lambda: pool.publish(handle, readers=readers))
        if known.state is not State.RESERVED or known.claims:
            return self.refused(InvalidStateError, lambda: pool.publish(handle, readers=readers))
        made = pool.publish(handle, readers=readers, num_tokens=num_tokens)
        self.model.publish(known, num_tokens, readers)
        self.expect(made, known)
        return made

    @rule(target=leases, handle=handles, who=st.integers(0, 9))
    def open(self, handle: BlockHandle, who: int) -> object:
        name = self.actor(who)
        known = self.model.knows(handle)
        if known is None:
            return self.refused(StaleHandleError, lambda: self.actors[name].open(handle))
        if not self.model.can_open(known):
            return self.refused(InvalidStateError, lambda: self.actors[name].open(handle))
        claim = Claim(name, reads=True)
        self.model.claim(known, claim)
        return handle, claim, self.actors[name].open(handle)

    @rule(target=leases, handle=handles, who=st.integers(0, 9))
    def write(self, handle: BlockHandle, who: int) -> object:
        name = self.actor(who)
        known = self.model.knows(handle)
        if known is None:
            return self.refused(StaleHandleError, lambda: self.actors[name].open_for_write(handle))
        if known.state is not State.RESERVED:
            return self.refused(InvalidStateError, lambda: self.actors[name].open_for_write(handle))
        claim = Claim(name, reads=False)
        self.model.claim(known, claim)
        return handle, claim, self.actors[name].open_for_write(handle)

    @rule(held=consumes(leases))
    def release(self, held: Held) -> None:
        handle, claim, lease = held
        known = self.model.live.get(handle.generation)
        is_open = known is not None and any(each is claim for each in known.claims)
        if claim.holder in self.actors:
            assert lease.is_released != is_open
            lease.release()
            if known is not None and is_open:
                self.model.release(known, claim)
        assert lease.is_released or claim.holder not in self.actors
        lease.release()
        self.graves.append(lease)

    # ---- what always holds -------------------------------------------------------------------

    @invariant()
    def everything_is_accounted_for(self) -> None:
        assert self.pool.check() == []
        stats = self.pool.stats()
        counts = dict.fromkeys(State, 0)
        for each in self.model.live.values():
            counts[each.state] += each.blocks
        assert stats.free_blocks == self.model.free_blocks == self.pool.available_blocks()
        assert (
            stats.reserved_blocks,
            stats.published_blocks,
            stats.leased_blocks,
            stats.draining_blocks,
            stats.settling_blocks,
        ) == tuple(counts[state] for state in list(State)[1:])
        assert stats.dead_participants == len(self.model.dead)
        assert stats.leases == sum(len(each.claims) for each in self.model.live.values())

    @invariant()
    def every_allocation_is_the_models(self) -> None:
        got = {info.generation: info for info in self.pool.allocations()}
        assert set(got) == set(self.model.live)
        for generation, expected in self.model.live.items():
            info = got[generation]
            assert (info.start_block, info.num_blocks, info.num_tokens) == (
                expected.start, expected.blocks, expected.tokens,
            )  # fmt: skip
            assert (info.state, info.readers_left) == (expected.state, expected.readers_left)

    def teardown(self) -> None:
        for name in sorted(self.actors.keys() - {"first"}):
            self.model.leave(name)
            self.actors[name].close()
        self.model.reap()
        self.pool.reap()
        self.everything_is_accounted_for()
        self.pool.close()


class PoolMachineWithDeaths(PoolMachine):
    """Participants come, leave and die, at any time, holding anything."""

    @initialize()
    def begin_with_two(self) -> None:
        self.attach()

    @rule()
    @precondition(lambda self: len(self.actors) < 4)
    def attach(self) -> None:
        name = f"actor {next(self.numbers)}"
        self.actors[name] = pools.attach(self.pool.name, role=name)

    @rule(number=st.integers(0, 9))
    @precondition(lambda self: len(self.actors) > 1)
    def leave(self, number: int) -> None:
        name = self.other(number)
        self.actors.pop(name).close()
        self.model.leave(name)

    @rule(number=st.integers(0, 9))
    @precondition(lambda self: len(self.actors) > 1)
    def die(self, number: int) -> None:
        name = self.other(number)
        pool = self.actors.pop(name)
        pools.abandon(pool)
        self.graves.append(pool)
        self.model.die(name)

    def other(self, number: int) -> str:
        """Not the first, who looks after everything."""
        names = sorted(self.actors.keys() - {"first"})
        return names[number % len(names)]

    @rule(
        target=PoolMachine.handles,
        handle=PoolMachine.handles,
        size=few_tokens,
        readers=st.integers(0, 2),
    )
    def fork_and_be_killed(self, handle: BlockHandle, size: int, readers: int) -> object:
        """A real child of this process that reserves, perhaps publishes, reads, and is killed."""
        name = f"child {next(self.numbers)}"
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            live_and_die(self.pool, handle, size, readers, tell)
        os.close(tell)
        os.waitpid(pid, 0)
        with os.fdopen(told, "rb") as file:
            data = file.read()
        self.model_of_child(name, handle, size, readers)
        self.model.die(name)
        return BlockHandle.decode(data) if data else multiple()

    def model_of_child(self, name: str, handle: BlockHandle, size: int, readers: int) -> None:
        known = self.model.knows(handle)
        if known is not None and self.model.can_open(known):
            self.model.claim(known, Claim(name, reads=True))
        made = self.model.alloc(-(-size // pools.BLOCK_SIZE), size, name)
        if made is not None and readers:
            self.model.publish(made, size, readers)

    @rule()
    def reap(self) -> None:
        report = self.pool.reap()
        assert report.participants == len(self.model.dead)
        before = self.model.free_blocks
        self.model.reap()
        assert report.blocks == self.model.free_blocks - before


def live_and_die(pool: BlockPool, handle: BlockHandle, size: int, readers: int, tell: int) -> None:
    """In the child: SIGKILL whatever happens, so that none of the parent's clean-up runs here."""
    try:
        kept = []
        try:
            kept.append(pool.open(handle))
        except (StaleHandleError, InvalidStateError):
            pool.available_blocks()
        made = pool.alloc(size)
        if made is not None and readers:
            made = pool.publish(made, readers=readers)
        os.write(tell, made.encode() if made is not None else b"")
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


# Without `explain`, which traces every line: a failure would take minutes to be told.
PHASES = [phase for phase in Phase if phase is not Phase.explain]

TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40, phases=PHASES)
TestPoolWithDeaths = PoolMachineWithDeaths.TestCase
TestPoolWithDeaths.settings = settings(max_examples=25, stateful_step_count=40, phases=PHASES)
