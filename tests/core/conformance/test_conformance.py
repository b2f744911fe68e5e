"""What every kind of pool does, and what every queue carries: publish here, read there, equal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from shmblocks import (
    BlockHandle,
    BlockPool,
    Field,
    InvalidStateError,
    PoolExistsError,
    PoolNotFoundError,
    StaleHandleError,
    multimodal_fields,
)
from shmblocks.config import DTYPES
from tests.core import pools
from tests.core.conformance.kinds import KINDS, Kind
from tests.core.conformance.queues import QUEUES, Line, QueueKind
from tests.support.children import Channel, fork

CONFIG = pools.tiny(
    32,
    block_size=8,
    fields=(
        *multimodal_fields(24, num_deepstack=2),
        *(Field(f"one_{dtype}", (3,), dtype) for dtype in DTYPES),
    ),
)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def pool(kind: Kind, pool_name: str) -> Iterator[BlockPool]:
    with kind.create(pool_name, CONFIG) as made:
        yield made
        assert made.check() == []


def write_pattern(kind: Kind, pool: BlockPool, handle: BlockHandle, seed: int) -> None:
    for name, tensor in pool.view(handle).items():
        stored = tensor.t() if name == "mrope_positions" else tensor
        stored.view(torch.uint8).copy_(pattern(name, stored, seed))
    pool.view(handle).aux[0] = seed


def pattern(name: str, stored: torch.Tensor, seed: int) -> torch.Tensor:
    """The bytes of a field; only 0 and 1 where it is bool."""
    shape = stored.view(torch.uint8).shape
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    values = (count * 31 + seed * 7 + len(name)) % (2 if stored.dtype is torch.bool else 251)
    return values.to(torch.uint8).view(shape)


def differences(
    kind: Kind, read: Callable[[str], torch.Tensor], names: list[str], seed: int
) -> list[str]:
    """The fields that are not, bit for bit, what `write_pattern` wrote."""
    wrong = []
    for name in names:
        tensor = kind.to_host(read(name))
        stored = tensor.t() if name == "mrope_positions" else tensor
        if not torch.equal(stored.view(torch.uint8), pattern(name, stored, seed)):
            wrong.append(name)
    return wrong


NAMES = [field.name for field in CONFIG.fields]

# --- every kind of pool -----------------------------------------------------------------------


def test_a_pool_is_attached_by_name_and_named_once(kind: Kind, pool: BlockPool) -> None:
    with kind.attach(pool.name) as other:
        assert (other.pool_id, other.config) == (pool.pool_id, CONFIG)
    with pytest.raises(PoolExistsError):
        kind.create(pool.name, CONFIG)
    with pytest.raises(PoolNotFoundError):
        kind.attach(f"{pool.name}-other")


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 200])
def test_what_is_published_is_read_bit_for_bit_by_another_attachment(
    kind: Kind, pool: BlockPool, num_tokens: int
) -> None:
    pools.take(pool)
    handle = pools.take(pool, num_tokens)
    write_pattern(kind, pool, handle, 5)
    handle = pool.publish(handle)
    with kind.attach(pool.name) as other, other.open(handle) as lease:
        assert differences(kind, lease.__getitem__, NAMES, 5) == []
        assert int(kind.to_host(lease.aux)[0]) == 5
    assert pool.available_blocks() == 31


def test_shapes_are_those_of_the_fields(kind: Kind, pool: BlockPool) -> None:
    view = pool.view(pools.take(pool, 13))
    assert {name: tuple(tensor.shape) for name, tensor in view.items()} == {
        "input_embeddings": (13, 24),
        "fill_ids": (13,),
        "mrope_positions": (3, 13),
        "deepstack_embeddings": (13, 48),
        **{f"one_{dtype}": (13, 3) for dtype in DTYPES},
    }


def test_a_freed_handle_cannot_be_read(kind: Kind, pool: BlockPool) -> None:
    handle = pool.publish(pools.take(pool, 9))
    pool.free(handle)
    with pytest.raises(StaleHandleError):
        pool.open(handle)


def test_a_reader_by_name_opens_what_nobody_else_can(kind: Kind, pool: BlockPool) -> None:
    with kind.attach(pool.name) as other:
        assert other.participant is not None
        handle = pools.take(pool, 9)
        write_pattern(kind, pool, handle, 4)
        handle = pool.publish(handle, readers=[other.participant])
        with pytest.raises(InvalidStateError):
            pool.open(handle)
        with other.open(handle) as lease:
            assert differences(kind, lease.__getitem__, NAMES, 4) == []
        again = pool.publish(pools.take(pool, 9), readers=[other.participant])
        assert pool.forgo(again, reader=other.participant)
    assert pool.available_blocks() == 32


def test_an_unpublished_handle_cannot_be_read(kind: Kind, pool: BlockPool) -> None:
    with kind.attach(pool.name) as other, pytest.raises(InvalidStateError):
        other.open(pools.take(pool, 9))


def test_growing_keeps_the_content(kind: Kind, pool: BlockPool) -> None:
    handle = pools.take(pool, 9)
    write_pattern(kind, pool, handle, 6)
    grown = pool.grow(handle, 60)
    assert grown is not None
    view = pool.view(grown)

    def first_nine(name: str) -> torch.Tensor:
        return view[name][:, :9] if name == "mrope_positions" else view[name][:9]

    assert differences(kind, first_nine, NAMES, 6) == []


def test_a_landing_allocation_is_written_by_another_and_read_by_its_owner(
    kind: Kind, pool: BlockPool
) -> None:
    landing = pool.alloc_default()
    assert landing is not None
    with kind.attach(pool.name) as other, other.open_for_write(landing) as lease:
        for name in NAMES:
            stored = lease[name].t() if name == "mrope_positions" else lease[name]
            stored.view(torch.uint8).copy_(pattern(name, stored, 7))
    assert differences(kind, pool.view(landing).__getitem__, NAMES, 7) == []


def test_a_tensor_outlives_its_pool(kind: Kind, pool_name: str) -> None:
    pool = kind.create(pool_name, CONFIG)
    handle = pools.take(pool, 9)
    write_pattern(kind, pool, handle, 8)
    kept = dict(pool.view(handle).items())
    pool.close()
    assert differences(kind, kept.__getitem__, NAMES, 8) == []


# --- every queue ------------------------------------------------------------------------------


@pytest.fixture(params=QUEUES, ids=lambda queue: queue.name)
def lines(request: pytest.FixtureRequest) -> Iterator[tuple[QueueKind, Line, Line]]:
    """The kind of queue, one to the reader and one back."""
    queue: QueueKind = request.param
    there, back = queue.make(), queue.make()
    yield queue, there, back
    there.close()
    back.close()


def read_all(kind: Kind, pool: BlockPool, there: Line, back: Line) -> None:
    """The reader: handles in, what was wrong with their blocks out."""
    while (message := there.get()) is not None:
        handle = BlockHandle.decode(message) if isinstance(message, bytes) else message
        assert isinstance(handle, BlockHandle)
        with pool.open(handle) as lease:
            back.put(differences(kind, lease.__getitem__, NAMES, int(kind.to_host(lease.aux)[0])))


def reader(
    kind: Kind, pool: BlockPool, queue: QueueKind, there: Line, back: Line
) -> AbstractContextManager[object]:
    if queue.is_for_threads:
        return thread(lambda: read_all(kind, pool, there, back))

    def in_child(channel: Channel) -> None:
        read_all(kind, pool, there, back)

    return fork(in_child)


@contextmanager
def thread(body: Callable[[], None]) -> Iterator[None]:
    running = threading.Thread(target=body)
    running.start()
    try:
        yield
    finally:
        running.join()


def test_a_handle_crosses_the_queue_and_is_read_bit_for_bit_at_the_other_end(
    kind: Kind, pool: BlockPool, lines: tuple[QueueKind, Line, Line]
) -> None:
    queue, there, back = lines
    with reader(kind, pool, queue, there, back):
        for seed in range(1, 9):
            handle = pools.take(pool, seed * 9)
            write_pattern(kind, pool, handle, seed)
            handle = pool.publish(handle)
            # As bytes, which any queue carries, and as the value that it is.
            there.put(handle.encode() if seed % 2 else handle)
            assert back.get() == []
        there.put(None)
    assert pool.available_blocks() == 32
