"""`TensorCache`: tensors of any dtype and shape, by what they are."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch

from shmblocks import (
    UNBOUNDED,
    BlockPool,
    IncompatibleConfigError,
    InvalidStateError,
    PoolConfig,
    PoolTimeoutError,
)
from shmblocks.cache import CacheLease, Claim, TensorCache, byte_config
from shmblocks.config import DTYPES
from tests.cache import kit
from tests.support.children import Channel, run_in_child, run_in_fork, spawn, wait_until

KEY = kit.key("a")
BLOCK = 64 * 1024


@pytest.fixture
def cache(pool_name: str) -> Iterator[TensorCache]:
    """16 blocks of 64 KiB."""
    with BlockPool.create(pool_name, byte_config(1 << 20), prefault="off") as pool:
        yield TensorCache(pool)
        if not pool.is_closed:
            assert pool.check() == []


def attached(name: str) -> TensorCache:
    return TensorCache(BlockPool.attach(name, prefault="off"))


def got(cache: TensorCache, key: bytes = KEY) -> torch.Tensor:
    """A copy of what is there."""
    lease = cache.get(key)
    assert lease is not None
    with lease:
        return lease.tensor.clone()


def number(value: int, size: int = 16) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.int32)


def test_tickets_say_what_tensor_they_are_for(cache: TensorCache) -> None:
    cache.put(KEY, torch.zeros(5, 3, dtype=torch.bfloat16))
    found = cache.get_tickets(KEY, leases=2)
    assert found is not None
    assert (found.dtype, found.shape, found.num_bytes) == ("bf16", (5, 3), 30)
    with cache.adopt(found.tickets[0]) as lease:
        assert (lease.dtype, tuple(lease.tensor.shape)) == (torch.bfloat16, (5, 3))
    assert cache.pool.revoke(found.tickets[1])
    assert cache.get_tickets(kit.key("b")) is None


def test_tickets_of_what_no_tensor_cache_has_put_are_refused(cache: TensorCache) -> None:
    with cache.pool.reserve(1) as reservation:
        reservation.publish(readers=UNBOUNDED, key=KEY)
    with pytest.raises(IncompatibleConfigError, match="TensorCache has put"):
        cache.get_tickets(KEY, leases=2)
    assert cache.pool.stats().leases == 0


def test_a_forked_child_does_not_abandon_the_claim_of_its_parent(cache: TensorCache) -> None:
    with cache.get_or_claim(KEY) as claim:
        assert isinstance(claim, Claim)
        run_in_fork(claim.abandon)
        assert cache.pool.claimant(KEY) == cache.pool.participant
    assert cache.pool.claimant(KEY) is None


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_every_dtype_comes_back_as_it_was(cache: TensorCache, dtype: str) -> None:
    bits = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    tensor = (bits > 127) if dtype == "bool" else bits.view(getattr(torch, DTYPES[dtype][1]))
    assert cache.put(KEY, tensor)
    lease = cache.get(KEY)
    assert lease is not None
    with lease:
        assert (lease.tensor.dtype, lease.tensor.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(lease.tensor.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (3, 5), (2, 1, 3), (1, 2, 1, 2, 1, 2, 1, 2), (1000, 33)]
)
def test_a_tensor_of_every_shape_comes_back_as_it_was(
    cache: TensorCache, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape)
    assert cache.put(KEY, tensor)
    assert torch.equal(got(cache), tensor)


def test_strides_and_gradients_do_not_matter(cache: TensorCache) -> None:
    tensor = torch.randn(6, 4, requires_grad=True).t()[::2]
    assert cache.put(KEY, tensor)
    lease = cache.get(KEY)
    assert lease is not None
    with lease:
        assert lease.tensor.is_contiguous()
        assert not lease.tensor.requires_grad
        assert torch.equal(lease.tensor, tensor.detach())


def test_an_entry_may_fill_the_whole_pool(cache: TensorCache) -> None:
    tensor = torch.arange((1 << 20) // 4, dtype=torch.int32)
    assert cache.put(KEY, tensor)
    assert torch.equal(got(cache), tensor)
    assert cache.pool.available_blocks() == 0


@pytest.mark.parametrize(
    "tensor", [torch.empty(0), torch.empty(3, 0), torch.zeros((1,) * 9)], ids=["0", "3x0", "9d"]
)
def test_a_tensor_that_cannot_be_kept_is_refused_and_nothing_is_taken(
    cache: TensorCache, tensor: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="tensor: expected 0 to 8 dimensions"):
        cache.put(KEY, tensor)
    assert cache.pool.available_blocks() == 16


def test_a_dtype_that_cannot_be_kept_is_refused_and_nothing_is_taken(cache: TensorCache) -> None:
    with pytest.raises(ValueError, match="dtype: expected one of"):
        cache.put(KEY, torch.empty(3, dtype=torch.bits8))
    assert cache.pool.available_blocks() == 16


def test_the_first_to_put_a_key_wins(cache: TensorCache) -> None:
    assert cache.put(KEY, number(1))
    assert not cache.put(KEY, number(2))
    assert torch.equal(got(cache), number(1))
    assert cache.pool.available_blocks() == 15


def test_put_many_says_how_many_were_stored(cache: TensorCache) -> None:
    items = [(kit.key(value), number(value)) for value in (1, 2, 2, 3)]
    assert cache.put_many(items) == 3


def test_another_process_gets_what_this_one_put(cache: TensorCache) -> None:
    tensor = torch.randn(100, 7)
    cache.put(KEY, tensor)
    assert run_in_child(_got_there, cache.pool.name) == tensor.tolist()


def _got_there(name: str) -> object:
    cache = attached(name)
    with cache.pool:
        return got(cache).tolist()


# ---- leases --------------------------------------------------------------------------------------


def test_a_lease_is_over_the_pools_memory_until_it_is_released(cache: TensorCache) -> None:
    cache.put(KEY, number(1))
    first, second = cache.get(KEY), cache.get(KEY)
    assert first is not None
    assert second is not None
    assert first.tensor.data_ptr() == second.tensor.data_ptr()
    assert not first.is_claim
    first.release()
    first.release()
    assert first.is_released
    with pytest.raises(InvalidStateError):
        first.tensor  # noqa: B018
    assert int(second.tensor[0]) == 1
    second.release()


def test_a_leased_tensor_stays_while_others_come_and_go(cache: TensorCache) -> None:
    cache.put(KEY, number(1))
    lease = cache.get(KEY)
    assert lease is not None
    with lease:
        for value in range(100):
            assert cache.put(kit.key(value), number(value))
        assert torch.equal(lease.tensor, number(1))
    assert cache.pool.cache_stats().evictions >= 85


def test_a_lease_travels_as_a_ticket(cache: TensorCache) -> None:
    cache.put(KEY, number(5))
    lease = cache.get(KEY)
    assert lease is not None
    ticket = lease.ticket()
    assert run_in_child(_adopted, cache.pool.name, ticket) == number(5).tolist()
    assert cache.pool.stats().leases == 0


def _adopted(name: str, ticket: bytes) -> object:
    cache = attached(name)
    with cache.pool, cache.adopt(ticket) as lease:
        return lease.tensor.tolist()


def test_leases_and_claims_cannot_be_copied_or_pickled(cache: TensorCache) -> None:
    with cache.get_or_claim(KEY) as claim:
        assert claim.is_claim
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                call(claim)
        cache.put(KEY, number(1))
    with cache.get_or_claim(KEY) as lease:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                call(lease)


# ---- another shape or dtype ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8,), None), ((4, 4), None), (None, torch.float32), ((16,), torch.int64)],
)
def test_another_shape_or_dtype_is_a_miss_and_counted(
    cache: TensorCache, shape: tuple[int, ...] | None, dtype: torch.dtype | None
) -> None:
    cache.put(KEY, number(1))
    assert cache.get(KEY, shape=shape, dtype=dtype) is None
    assert cache.pool.cache_stats().mismatches == 1
    assert cache.pool.stats().leases == 0


def test_what_is_expected_and_there_is_a_hit(cache: TensorCache) -> None:
    cache.put(KEY, number(1))
    lease = cache.get(KEY, shape=(16,), dtype=torch.int32)
    assert lease is not None
    lease.release()


def test_a_key_reused_for_another_shape_is_encoded_anew_and_not_stored(cache: TensorCache) -> None:
    cache.put(KEY, number(1))
    with cache.get_or_claim(KEY, shape=(8,)) as claim:
        assert isinstance(claim, Claim)
        assert not claim.put(number(2, 8))
    assert torch.equal(got(cache), number(1))


def test_an_entry_that_is_no_tensor_is_told(cache: TensorCache) -> None:
    kit.put(cache.pool, "a")
    with pytest.raises(IncompatibleConfigError, match="an entry that a TensorCache has put"):
        cache.get(KEY)
    assert cache.pool.stats().leases == 0


def test_a_pool_of_other_fields_is_refused(pool_name: str) -> None:
    config = PoolConfig(total_tokens=16, block_size=4)
    with (
        BlockPool.create(pool_name, config, prefault="off") as pool,
        pytest.raises(IncompatibleConfigError, match="expected a byte pool"),
    ):
        TensorCache(pool)


# ---- no room -------------------------------------------------------------------------------------


def test_without_room_nothing_is_stored_or_evicted_and_it_is_counted(cache: TensorCache) -> None:
    cache.put(KEY, number(1, BLOCK // 4 * 8))
    lease = cache.get(KEY)
    assert lease is not None
    cache.put(kit.key("b"), number(2))
    assert not cache.put(kit.key("c"), number(3, BLOCK // 4 * 9))
    assert kit.is_there(cache.pool, "b")
    lease.release()
    stats = cache.pool.cache_stats()
    assert (stats.skipped, stats.evictions) == (1, 0)


def test_what_the_pool_can_never_hold_is_not_stored(cache: TensorCache) -> None:
    assert not cache.put(KEY, torch.zeros(1 << 20, dtype=torch.int32))
    assert cache.pool.cache_stats().skipped == 1


def test_a_put_without_room_ends_the_claim(cache: TensorCache) -> None:
    with cache.get_or_claim(KEY) as claim:
        assert isinstance(claim, Claim)
        assert not claim.put(torch.zeros(1 << 20, dtype=torch.int32))
        assert cache.pool.cache_stats().claims == 0


def test_a_put_that_is_refused_ends_the_claim(cache: TensorCache) -> None:
    cache.pool.claim(KEY)
    with pytest.raises(ValueError, match="dtype"):
        cache.put(KEY, torch.empty(3, dtype=torch.bits8))
    assert cache.pool.cache_stats().claims == 0


# ---- get or claim --------------------------------------------------------------------------------


def test_who_misses_gets_the_claim_and_its_put_ends_it(cache: TensorCache) -> None:
    with cache.get_or_claim(KEY) as claim:
        assert isinstance(claim, Claim)
        assert claim.key == KEY
        assert claim.put(number(1))
    with cache.get_or_claim(KEY) as lease:
        assert isinstance(lease, CacheLease)
        assert torch.equal(lease.tensor, number(1))


def test_a_claim_that_is_not_put_is_abandoned_with_its_block(cache: TensorCache) -> None:
    with pytest.raises(ZeroDivisionError), cache.get_or_claim(KEY):
        raise ZeroDivisionError
    with cache.get_or_claim(KEY, timeout=0.0) as claim:
        assert claim.is_claim


def test_a_claim_that_is_dropped_is_abandoned_with_a_warning(cache: TensorCache) -> None:
    claim = cache.get_or_claim(KEY)
    with pytest.warns(ResourceWarning, match="neither put nor abandoned"):
        del claim
    assert cache.pool.cache_stats().claims == 0


def test_an_old_claim_does_not_end_a_new_one(cache: TensorCache) -> None:
    old = cache.get_or_claim(KEY)
    cache.put(KEY, number(1))
    cache.pool.drop(KEY)
    new = cache.get_or_claim(KEY)
    assert isinstance(old, Claim)
    assert isinstance(new, Claim)
    old.abandon()
    assert cache.pool.cache_stats().claims == 1
    new.abandon()
    assert cache.pool.cache_stats().claims == 0


def test_who_waits_too_long_is_told_for_whom(cache: TensorCache) -> None:
    with spawn(_claim_there, cache.pool.name) as child:
        child.hear("claimed")
        with pytest.raises(PoolTimeoutError, match=f"key {KEY.hex()}, which .*pid {child.pid}"):
            cache.get_or_claim(KEY, timeout=0.05)
        with pytest.raises(PoolTimeoutError):
            cache.get_or_claim(KEY, timeout=0.0)
        child.kill()
    with cache.get_or_claim(KEY, timeout=30.0) as claim:
        assert claim.is_claim
    assert cache.pool.cache_stats().takeovers == 1


def _claim_there(channel: Channel, name: str) -> None:
    cache = attached(name)
    with cache.pool, cache.get_or_claim(KEY):
        channel.say("claimed")
        channel.receive()


def test_who_waits_gets_what_the_other_puts(cache: TensorCache) -> None:
    claim = cache.get_or_claim(KEY)
    assert isinstance(claim, Claim)
    results: list[torch.Tensor] = []

    def wait() -> None:
        with cache.get_or_claim(KEY, timeout=60.0) as lease:
            assert isinstance(lease, CacheLease)
            results.append(lease.tensor.clone())

    threads = [threading.Thread(target=wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: cache.pool.cache_stats().waits == 5, "five wait")
    claim.put(number(9))
    for thread in threads:
        thread.join()
    assert len(results) == 5
    assert all(torch.equal(result, number(9)) for result in results)
    stats = cache.pool.cache_stats()
    assert (stats.lookups, stats.misses, stats.hits) == (11, 6, 5)


def test_coroutines_share_one_encode(cache: TensorCache) -> None:
    encodes = 0

    async def want() -> torch.Tensor:
        nonlocal encodes
        found = await cache.get_or_claim_async(KEY, timeout=60.0)
        with found:
            if isinstance(found, Claim):
                encodes += 1
                await asyncio.sleep(0)
                await cache.put_async(KEY, number(4))
                return number(4)
            return found.tensor.clone()

    async def main() -> list[torch.Tensor]:
        return await asyncio.gather(*(want() for _ in range(20)))

    results = asyncio.run(main())
    assert encodes == 1
    assert all(torch.equal(result, number(4)) for result in results)


def test_a_coroutine_that_waits_too_long_is_told(cache: TensorCache) -> None:
    async def main() -> None:
        with pytest.raises(PoolTimeoutError, match="encode it here, or wait longer"):
            await cache.get_or_claim_async(KEY, timeout=0.02)

    with cache.get_or_claim(KEY):
        asyncio.run(main())


# ---- many at once --------------------------------------------------------------------------------


def test_threads_read_and_write_one_cache(cache: TensorCache) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(60):
            value = (seed * 7 + step * 3) % 25
            with cache.get_or_claim(kit.key(value), timeout=60.0) as found:
                if isinstance(found, Claim):
                    found.put(number(value, 1 + value * 1000))
                elif not bool((found.tensor == value).all()):
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.pool.stats().leases == 0
    assert cache.pool.cache_stats().claims == 0


def test_processes_read_and_write_one_cache(cache: TensorCache) -> None:
    with spawn(_work, cache.pool.name, 1) as first, spawn(_work, cache.pool.name, 2) as second:
        assert first.result() == second.result() == 0
    assert cache.pool.stats().leases == 0


def _work(_: Channel, name: str, seed: int) -> int:
    """How many tensors were wrong."""
    cache = attached(name)
    wrong = 0
    with cache.pool:
        for step in range(150):
            value = (seed * 5 + step * 11) % 31
            with cache.get_or_claim(kit.key(value), timeout=60.0) as found:
                if isinstance(found, Claim):
                    found.put(number(value, 1 + value * 1000))
                else:
                    wrong += not bool((found.tensor == value).all())
    return wrong


# ---- byte pools ----------------------------------------------------------------------------------


def test_whoever_comes_first_makes_the_pool(pool_name: str) -> None:
    with (
        BlockPool.ensure(pool_name, byte_config(1 << 20), prefault="off") as first,
        BlockPool.ensure(pool_name, byte_config(1 << 20), prefault="off") as second,
    ):
        TensorCache(first).put(KEY, number(3))
        assert torch.equal(got(TensorCache(second)), number(3))
        with pytest.raises(IncompatibleConfigError, match="total_tokens"):
            BlockPool.ensure(pool_name, byte_config(2 << 20), prefault="off")


@pytest.mark.parametrize(("size", "block"), [(1 << 20, 1000), (1 << 20, 0), (1000, 64 * 1024)])
def test_a_byte_pool_of_no_block_is_refused(size: int, block: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        byte_config(size, block_bytes=block)
