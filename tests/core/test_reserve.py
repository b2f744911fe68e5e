"""Copying in and out, and reservations with an owner: what is not published comes back."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest
import torch

from shmblocks import (
    UNBOUNDED,
    BlockHandle,
    BlockPool,
    Field,
    InvalidStateError,
    Lease,
    PoolClosedError,
    PoolTimeoutError,
    Reservation,
    StaleHandleError,
    State,
)
from tests.core import pools
from tests.core.conftest import require_right
from tests.support.children import Channel, fork, run_in_fork, wait_until
from tests.support.inside import run_inside

FIELDS = (
    Field("rows", (3, 2), "fp32"),
    Field("ids", (), "int64"),
    Field("positions", (3,), "int32", transposed=True),
)


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """16 blocks of 4 tokens, with three fields; checked and closed after the test."""
    with pools.create(pool_name, pools.tiny(fields=FIELDS), role="tester") as made:
        yield made
        if not made.is_closed:
            require_right(made)


def tensors(num_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Numbers that differ everywhere."""
    count = torch.arange(num_tokens * 6, dtype=torch.float32)
    return {
        "rows": (count + seed).view(num_tokens, 3, 2),
        "ids": torch.arange(num_tokens) * 7 + seed,
        "positions": torch.arange(3 * num_tokens, dtype=torch.int32).view(3, num_tokens) + seed,
    }


def require_equal(got: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> None:
    for name, tensor in sent.items():
        assert torch.equal(got[name], tensor), name


# --- reserve ----------------------------------------------------------------------------------


def test_what_is_not_published_is_freed_when_the_block_ends(pool: BlockPool) -> None:
    with pool.reserve(9, req_id="r1") as reservation:
        (info,) = pool.allocations()
        assert (info.state, info.req_id, info.num_tokens) == (State.RESERVED, "r1", 9)
        assert pool.available_blocks() == 13
        was_over = reservation.is_over
    assert (was_over, reservation.is_over) == (False, True)
    assert pool.available_blocks() == 16


def test_what_is_not_published_is_freed_when_the_block_raises(pool: BlockPool) -> None:
    with pytest.raises(LookupError), pool.reserve(9):
        raise LookupError
    assert pool.available_blocks() == 16


def test_what_is_published_stays_when_the_block_ends_or_raises(pool: BlockPool) -> None:
    reservation = pool.reserve(9)
    reservation["ids"].fill_(4)
    with pytest.raises(LookupError), reservation:
        publish_and_raise(reservation)
    assert reservation.is_over
    handle = pool.handle_at(0)
    assert handle.num_tokens == 7
    assert [info.readers_left for info in pool.allocations()] == [2]
    with pool.open(handle) as lease:
        assert lease["ids"].tolist() == [4] * 7
    pool.free(handle)


def publish_and_raise(reservation: Reservation) -> None:
    reservation.publish(readers=2, num_tokens=7)
    raise LookupError


def test_a_reservation_is_published_once_and_freed_any_number_of_times(pool: BlockPool) -> None:
    with pool.reserve(4) as reservation:
        handle = reservation.publish()
        with pytest.raises(InvalidStateError, match="was published or freed"):
            reservation.publish()
        with pytest.raises(InvalidStateError, match="was published or freed"):
            reservation.grow(9)
        reservation.free()
        reservation.free()
    assert [str(info.state) for info in pool.allocations()] == ["published"]
    pool.free(handle)


def test_a_reservation_is_a_mapping_of_its_fields(pool: BlockPool) -> None:
    with pool.reserve(5) as reservation:
        assert list(reservation) == ["rows", "ids", "positions"]
        assert {name: tuple(each.shape) for name, each in reservation.items()} == {
            "rows": (5, 3, 2),
            "ids": (5,),
            "positions": (3, 5),
        }
        reservation.aux[0] = 5
        assert reservation.view.aux[0] == 5
        reservation.memory("ids")[:8] = (77).to_bytes(8, "little")
        assert int(reservation["ids"][0]) == 77
        assert {reservation: 1}[reservation] == 1
        assert reservation != dict(reservation)
        assert "open" in repr(reservation)
    assert "over" in repr(reservation)


def test_a_reservation_grows_in_place_and_keeps_its_content(pool: BlockPool) -> None:
    with pool.reserve(4) as reservation:
        first = reservation.handle
        reservation["ids"].fill_(3)
        assert reservation.grow(11)
        assert reservation.handle.num_tokens == 11
        assert reservation["ids"][:4].tolist() == [3] * 4
        with pytest.raises(StaleHandleError):
            pool.view(first)
        with pool.reserve(4):
            assert not reservation.grow(40), "the blocks behind it are taken"
        assert reservation.handle.num_tokens == 11
        handle = reservation.publish()
    assert handle.num_tokens == 11
    pool.free(handle)


def test_a_reservation_waits_for_blocks_and_is_told_who_holds_them(pool: BlockPool) -> None:
    with pool.reserve(64, req_id="big"):
        with pytest.raises(PoolTimeoutError, match=r"16 blocks from 0 for request big: reserved"):
            pool.reserve(1, timeout=0.01)
        assert pool.stats().waiters == 0

        def in_child(channel: Channel) -> int:
            channel.say("waits")
            with pool.reserve(1, timeout=50) as reservation:
                return reservation.handle.num_blocks

        with fork(in_child) as child:
            child.hear("waits")
            wait_until(lambda: pool.stats().waiters == 1, "it waits")
            pool.free(pool.handle_at(0))
            assert child.result() == 1


def test_a_reservation_of_what_can_never_be_served_is_refused(pool: BlockPool) -> None:
    with pytest.raises(ValueError, match="16 blocks, 17 can never be served"):
        pool.reserve(65)
    with pytest.raises(ValueError, match="num_tokens: expected a whole number from 1 to"):
        pool.reserve(0)


def test_a_dropped_reservation_is_freed_at_once_with_a_warning(pool: BlockPool) -> None:
    kept = [pool.reserve(4)]
    with pytest.warns(ResourceWarning, match="neither published nor freed"):
        kept.clear()
    assert pool.available_blocks() == 16


def test_a_reservation_that_is_dropped_inside_an_operation_is_freed_after_it(
    pool: BlockPool,
) -> None:
    kept = [pool.reserve(4)]
    with pytest.warns(ResourceWarning, match="neither published nor freed"):
        run_inside(pool, kept.clear)
    wait_until(lambda: pool.available_blocks() == 16, "another thread has freed it")


def test_a_reservation_ends_with_its_pool(pool: BlockPool) -> None:
    with pools.attach(pool.name) as other, other.reserve(4) as reservation:
        other.close()
        with pytest.raises(PoolClosedError):
            reservation["ids"]
        reservation.free()
    assert pool.available_blocks() == 16


def test_a_forked_child_that_drops_its_parents_reservation_takes_nothing(pool: BlockPool) -> None:
    with pool.reserve(4) as reservation:

        def in_child() -> bool:
            nonlocal reservation
            with reservation:
                pass
            reservation = None  # type: ignore[assignment]
            return True

        assert run_in_fork(in_child)
        assert pool.view(reservation.handle).num_tokens == 4


def test_a_reservation_is_awaited_in_asyncio_with_either_kind_of_block(pool: BlockPool) -> None:
    async def run() -> None:
        with await pool.reserve_async(4) as plain:
            plain["ids"].fill_(1)
        assert pool.available_blocks() == 16
        async with await pool.reserve_async(4) as reservation:
            handle = reservation.publish()
        assert pool.available_blocks() == 15
        pool.free(handle)
        with pool.reserve(64), pytest.raises(PoolTimeoutError):
            await pool.reserve_async(1, timeout=0.01)

    asyncio.run(run())


# --- views of what is over --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["free", "publish"])
def test_a_view_of_a_reservation_ends_with_it(pool: BlockPool, ending: str) -> None:
    """Found: it wrote into blocks that were another request's by then."""
    handle = pools.take(pool, 4)
    view = pool.view(handle)
    view["ids"].fill_(1)
    if ending == "free":
        pool.free(handle)
    else:
        pool.publish(handle)
    for use in (lambda: view["ids"], lambda: view.aux, lambda: view.memory("ids")):
        with pytest.raises(InvalidStateError, match="was published or freed"):
            use()
    again = pools.take(pool, 64 if ending == "free" else 60)
    with pytest.raises(InvalidStateError):
        view["ids"]
    pool.free(again)


def test_a_view_of_a_reservation_ends_when_another_process_frees_it(pool: BlockPool) -> None:
    handle = pools.take(pool, 4)
    view = pool.view(handle)
    run_in_fork(pool.free, handle)
    with pytest.raises(InvalidStateError):
        view["ids"]


# --- put and take -----------------------------------------------------------------------------


def test_what_is_put_is_taken_bit_for_bit_and_then_free(pool: BlockPool) -> None:
    sent = tensors(9)
    handle = pool.put(sent, req_id="r")
    assert [info.req_id for info in pool.allocations()] == ["r"]
    got = pool.take(handle)
    assert set(got) == {*sent, "aux"}
    require_equal(got, sent)
    assert got["aux"].tolist() == [9] + [0] * 15
    assert pool.available_blocks() == 16


def test_what_was_taken_is_private(pool: BlockPool) -> None:
    handle = pool.put(tensors(9), readers=2)
    first = pool.take(handle)
    for tensor in first.values():
        tensor.zero_()
    second = pool.take(handle)
    require_equal(second, tensors(9))
    with pools.attach(pool.name) as other:
        kept = other.take(other.put(tensors(5, seed=3)))
    require_equal(kept, tensors(5, seed=3))


def test_aux_is_put_like_a_field_and_never_left_over(pool: BlockPool) -> None:
    aux = torch.arange(16, dtype=torch.int32) + 1
    assert torch.equal(pool.take(pool.put({**tensors(64), "aux": aux}))["aux"], aux)
    assert pool.take(pool.put(tensors(64)))["aux"].tolist() == [64] + [0] * 15


def test_tensors_with_any_strides_are_put(pool: BlockPool) -> None:
    sent = tensors(10)
    strided = {
        "rows": torch.stack([sent["rows"], -sent["rows"]], dim=-1)[..., 0],
        "ids": torch.stack([sent["ids"], -sent["ids"]], dim=1)[:, 0],
        "positions": sent["positions"].t().contiguous().t(),
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    require_equal(pool.take(pool.put(strided)), sent)


def test_tensors_that_require_grad_are_put_without_a_graph(pool: BlockPool) -> None:
    sent = tensors(4)
    sent["rows"] = sent["rows"].requires_grad_() * 2
    got = pool.take(pool.put(sent))
    assert not got["rows"].requires_grad
    assert torch.equal(got["rows"], sent["rows"])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"rows": None},
            ValueError,
            "expected the fields rows, ids, positions, got ids, positions",
        ),
        ({"extra": torch.zeros(4)}, ValueError, "got rows, ids, positions, extra"),
        ({"ids": [1, 2, 3, 4]}, TypeError, r"tensors\['ids'\]: expected a tensor, got list"),
        (
            {"ids": torch.zeros(4, dtype=torch.int32)},
            TypeError,
            r"tensors\['ids'\]: expected torch.int64, got torch.int32; convert it",
        ),
        (
            {"rows": torch.zeros(4, 2, 3)},
            ValueError,
            r"tensors\['rows'\]: expected the shape \[4, 3, 2\], got \[4, 2, 3\]",
        ),
        (
            {"ids": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            r"tensors\['ids'\]: expected the shape \[4\], got \[5\]",
        ),
        (
            {"positions": torch.zeros(4, 3, dtype=torch.int32)},
            ValueError,
            r"tensors\['positions'\]: expected the shape \[3, 4\], got \[4, 3\]",
        ),
        (
            {"aux": torch.zeros(15, dtype=torch.int32)},
            ValueError,
            r"tensors\['aux'\]: expected the shape \[16\], got \[15\]",
        ),
    ],
)
def test_what_does_not_fit_is_told_by_its_field_and_takes_nothing(
    pool: BlockPool, change: dict[str, object], error: type[Exception], said: str
) -> None:
    sent = {name: each for name, each in {**tensors(4), **change}.items() if each is not None}
    before = pools.state_of(pool)
    with pytest.raises(error, match=said):
        pool.put(sent)  # type: ignore[arg-type]
    assert pools.state_of(pool) == before


def test_no_tokens_are_not_put(pool: BlockPool) -> None:
    with pytest.raises(ValueError, match="expected at least one token"):
        pool.put(tensors(0))


def test_a_put_whose_copy_fails_gives_its_blocks_back(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise LookupError

    monkeypatch.setattr("shmblocks.pool.fill", fail)
    with pytest.raises(LookupError):
        pool.put(tensors(4))
    assert pool.available_blocks() == 16


def test_a_put_waits_for_blocks_as_long_as_it_is_told(pool: BlockPool) -> None:
    with pool.reserve(64), pytest.raises(PoolTimeoutError):
        pool.put(tensors(4), timeout=0.01)


def test_taking_twice_what_was_announced_to_one_is_stale(pool: BlockPool) -> None:
    handle = pool.put(tensors(4))
    pool.take(handle)
    with pytest.raises(StaleHandleError):
        pool.take(handle)


def test_put_and_take_in_asyncio_are_the_same(pool: BlockPool) -> None:
    async def run() -> dict[str, torch.Tensor]:
        return await pool.take_async(await pool.put_async(tensors(9)))

    require_equal(asyncio.run(run()), tensors(9))
    assert pool.available_blocks() == 16


def test_large_copies_leave_the_event_loop_alone(pool_name: str) -> None:
    fields = (Field("rows", (1 << 18,), "fp32"),)
    with pools.create(pool_name, pools.tiny(4, fields=fields)) as pool:
        sent = {"rows": torch.full((4, 1 << 18), 3.0)}

        async def run() -> bool:
            got = await pool.take_async(await pool.put_async(sent))
            return torch.equal(got["rows"], sent["rows"])

        assert asyncio.run(run())
        assert pool.available_blocks() == 4


def test_another_process_takes_what_was_put(pool: BlockPool) -> None:
    handle = pool.put(tensors(9))
    got = run_in_fork(lambda: {name: each.tolist() for name, each in pool.take(handle).items()})
    assert got["ids"] == tensors(9)["ids"].tolist()
    assert got["positions"] == tensors(9)["positions"].tolist()


# --- the list of what there is ----------------------------------------------------------------


def test_the_list_of_allocations_is_right_after_anything_in_any_order(
    pool: BlockPool, rng: random.Random
) -> None:
    """Whatever is given back, the last of the list takes its index."""
    reserved: list[BlockHandle] = []
    published: list[BlockHandle] = []
    leases: list[Lease] = []
    for _ in range(300):
        action = rng.randrange(7)
        if action <= 1 and (handle := pool.alloc(rng.randint(1, 9))):
            reserved.append(handle)
        elif action == 2 and reserved:
            handle = reserved.pop(rng.randrange(len(reserved)))
            published.append(pool.publish(handle, readers=rng.choice((1, 2, UNBOUNDED))))
        elif action == 3 and published and len(leases) < 16:
            handle = rng.choice(published)
            with contextlib.suppress(StaleHandleError, InvalidStateError):
                leases.append(pool.open(handle))
        elif action == 4 and leases:
            lease = leases.pop(rng.randrange(len(leases)))
            rng.choice((lease.release, lease.give_back))()
        elif action == 5 and reserved:
            pool.free(reserved.pop(rng.randrange(len(reserved))))
        elif action == 6 and published:
            with contextlib.suppress(StaleHandleError):
                pool.free(published.pop(rng.randrange(len(published))))
        assert pool.check() == []
        assert len(pool.state.blocks.live_starts()) == pool.stats().allocations
    for lease in leases:
        lease.release()
