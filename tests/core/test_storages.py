"""What torch can do to a tensor that the pool has handed out stays within its allocation's rows.

Each of these once wrote into, read, or kept other requests' data, without an error.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.multiprocessing

from shmblocks import BlockPool, Field
from tests.core import pools
from tests.core.conftest import require_right
from tests.support.children import run_in_fork

WIDTH = 8
ROW_BYTES = 4 * WIDTH


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """64 blocks of 4 tokens."""
    fields = (Field("x", (WIDTH,), "fp32"), Field("m", (3,), "int32", transposed=True))
    with pools.create(pool_name, pools.tiny(64, fields=fields)) as made:
        yield made
        if not made.is_closed:
            require_right(made)


@pytest.fixture
def neighbour(pool: BlockPool) -> Iterator[Callable[[], None]]:
    """Published blocks behind the next allocation; a call requires that they are as they were."""
    first, second = pools.take(pool, 16), pools.take(pool, 100)
    pool.view(second)["x"].fill_(5.0)
    published = pool.publish(second)
    pool.free(first)

    def is_untouched() -> None:
        whole = pool.field("x")[second.start_block * 4 :][:100]
        assert bool((whole == 5.0).all())

    # So that the next allocation is the one before it.
    pool.free(pools.take(pool, 4 * (64 - 4 - 25)))
    yield is_untouched
    is_untouched()
    pool.free(published)


def before(pool: BlockPool) -> torch.Tensor:
    """A writable view of 16 tokens, just before the neighbour."""
    handle = pools.take(pool, 16)
    assert handle.start_block == 0
    return pool.view(handle)["x"]


def test_the_storage_of_a_tensor_is_exactly_its_rows(pool: BlockPool) -> None:
    view = pool.view(pools.take(pool, 6))
    assert view["x"].untyped_storage().nbytes() == 6 * ROW_BYTES
    assert view["m"].untyped_storage().nbytes() == 6 * 12
    assert view.aux.untyped_storage().nbytes() == 64
    with pool.open(pool.put({"x": torch.zeros(5, WIDTH), "m": torch.zeros(3, 5).int()})) as lease:
        assert lease["x"].untyped_storage().nbytes() == 5 * ROW_BYTES


@pytest.mark.usefixtures("neighbour")
def test_a_result_of_another_size_is_refused_as_an_out_argument(pool: BlockPool) -> None:
    out = before(pool)
    with pytest.raises(RuntimeError):
        torch.randn(100, WIDTH, out=out)


@pytest.mark.usefixtures("neighbour")
def test_a_tensor_cannot_be_resized_into_other_blocks(pool: BlockPool) -> None:
    out = before(pool)
    with pytest.raises(RuntimeError):
        out.resize_(100, WIDTH)
    with pytest.raises(RuntimeError):
        out.untyped_storage().resize_(100 * ROW_BYTES)
    with pytest.raises(RuntimeError, match="out of bounds"):
        out.as_strided((100, WIDTH), (WIDTH, 1))


def test_sharing_one_tensor_moves_no_later_view(pool: BlockPool) -> None:
    """torch swaps the storage: it was that of the whole field."""
    handle = pools.take(pool, 6)
    pool.view(handle)["x"].share_memory_()  # type: ignore[no-untyped-call]
    pool.view(handle)["x"].fill_(3.0)
    assert bool((pool.field("x")[:6] == 3.0).all())
    handle = pool.publish(handle)

    def read() -> float:
        with pool.open(handle) as lease:
            return float(lease["x"].sum())

    assert run_in_fork(read) == 3.0 * 6 * WIDTH


def test_a_tensor_sent_over_torchs_queue_arrives_and_moves_no_later_view(pool: BlockPool) -> None:
    def send_and_receive() -> bool:
        handle = pools.take(pool, 6)
        pool.view(handle)["x"].fill_(2.0)
        queue = torch.multiprocessing.get_context("fork").SimpleQueue()
        queue.put(pool.view(handle)["x"])
        got = queue.get()
        arrived = got.shape == (6, WIDTH) and bool((got == 2.0).all())
        pool.view(handle)["x"].fill_(4.0)
        return arrived and bool((pool.field("x")[:6] == 4.0).all())

    # In a child, with which everything goes that torch keeps for its queues.
    assert run_in_fork(send_and_receive)


def saved(tensor: torch.Tensor) -> int:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.tell()


@pytest.mark.parametrize("size", [lambda x: len(pickle.dumps(x)), saved], ids=["pickle", "save"])
def test_a_tensor_is_written_with_its_own_rows_only(
    pool: BlockPool, size: Callable[[torch.Tensor], int]
) -> None:
    secret = pools.take(pool, 4 * 30)
    pool.view(secret)["x"].fill_(9.0)
    handle = pools.take(pool, 2)
    assert size(pool.view(handle)["x"]) < 2 * ROW_BYTES + 3000
    with pool.open(pool.publish(handle)) as lease:
        assert size(lease["x"]) < 2 * ROW_BYTES + 3000


def test_a_deep_copy_is_private_and_of_its_rows(pool: BlockPool) -> None:
    tensor = pool.view(pools.take(pool, 2))["x"]
    twin = copy.deepcopy(tensor)
    assert twin.untyped_storage().nbytes() == 2 * ROW_BYTES
    twin.fill_(1.0)
    assert float(tensor.sum()) == 0.0


def test_a_graph_that_was_written_into_one_view_reaches_no_other(pool: BlockPool) -> None:
    weight = torch.ones(WIDTH, requires_grad=True)
    handle = pools.take(pool, 2)
    view = pool.view(handle)
    view["x"].copy_(weight.expand(2, WIDTH) * 2)
    assert bool((view["x"] == 2.0).all())
    assert not view["x"].requires_grad
    assert view["x"].grad_fn is None
    assert not pool.view(pools.take(pool, 2))["x"].requires_grad
    with pool.open(pool.publish(handle)) as lease:
        assert not lease["x"].requires_grad


def test_a_first_view_in_inference_mode_changes_no_later_one(pool: BlockPool) -> None:
    handle = pools.take(pool, 2)
    with torch.inference_mode():
        pool.view(handle)["x"].fill_(1.0)
        pool.view(handle).aux[0] = 2
    pool.view(handle)["x"].add_(1.0)
    pool.view(handle).aux.add_(1)
    layer = torch.nn.Linear(WIDTH, 1)
    layer(pool.view(handle)["x"]).sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        pool.put({"x": torch.zeros(5, WIDTH), "m": torch.zeros(3, 5).int()})
    pool.put({"x": torch.zeros(5, WIDTH), "m": torch.zeros(3, 5).int()})


def test_swapping_the_data_of_one_tensor_moves_no_other(pool: BlockPool) -> None:
    handle = pools.take(pool, 2)
    tensor = pool.view(handle)["x"]
    tensor.data = torch.zeros(2, WIDTH)
    tensor.fill_(8.0)
    assert float(pool.view(handle)["x"].sum()) == 0.0
    pool.view(handle)["x"].fill_(1.0)
    assert float(pool.field("x")[:2].sum()) == 2 * WIDTH


def test_the_whole_field_is_whole_on_purpose(pool: BlockPool) -> None:
    assert pool.field("x").untyped_storage().nbytes() == 64 * 4 * ROW_BYTES
    pool.field("x").fill_(6.0)
    assert float(pool.view(pools.take(pool, 1))["x"][0, 0]) == 6.0
