"""What torch's users do with a tensor that was handed out, and whom it must not reach.

Most of these are no programs of their own, since importing torch takes two seconds. CASES A is the
kind: a tensor that shares its storage with other requests leads torch into their data.
"""

from __future__ import annotations

import copy
import io
import pickle
import signal
import struct
import warnings
from collections.abc import Iterator

import pytest
import torch

from shmblocks import BlockHandle, BlockPool, Field, InvalidStateError, PoolConfig
from tests.users.kit import Program

FIELDS = (
    Field("x", (8,), "fp32"),
    Field("m", (3,), "int32", transposed=True),
    Field("raw", (), "int8"),
)
# Bytes of torch's own words around a pickled tensor. Smaller: another version of torch fails.
ENVELOPE = 4096


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    config = PoolConfig(total_tokens=1024, block_size=4, fields=FIELDS)
    with BlockPool.create(pool_name, config, prefault="off") as pool:
        yield pool


def take(pool: BlockPool, tokens: int) -> BlockHandle:
    handle = pool.alloc(tokens)
    assert handle is not None
    return handle


def published(pool: BlockPool, tokens: int, value: float) -> BlockHandle:
    handle = take(pool, tokens)
    pool.view(handle)["x"].fill_(value)
    return pool.publish(handle)


def values(pool: BlockPool, handle: BlockHandle) -> set[float]:
    with pool.open(handle) as lease:
        return set(lease["x"].flatten().tolist())


def test_a_tensor_has_a_storage_of_exactly_its_rows(pool: BlockPool) -> None:
    take(pool, 9)
    handle = take(pool, 10)
    view = pool.view(handle)
    for name, size in (("x", 10 * 8 * 4), ("m", 10 * 3 * 4), ("raw", 10)):
        assert view[name].untyped_storage().nbytes() == size
        assert view[name].storage_offset() == 0
    assert view.aux.untyped_storage().nbytes() == 64
    with pool.open(pool.publish(handle)) as lease:
        assert lease["x"].untyped_storage().nbytes() == 10 * 8 * 4
        assert lease.aux.untyped_storage().nbytes() == 64


def test_a_view_that_torch_shares_takes_no_later_view_with_it(pool: BlockPool) -> None:
    """CASES A (pytorch#86467): later requests were written into private memory."""
    handle = take(pool, 10)
    shared = pool.view(handle)["x"]
    try:
        shared.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError:
        pass  # a refusal is as good
    for later in (handle, take(pool, 10)):
        pool.view(later)["x"].fill_(7.0)
        assert bytes(pool.view(later).memory("x")) == struct.pack("<f", 7.0) * 80


def test_an_output_of_the_wrong_size_is_an_error_and_writes_nothing(pool: BlockPool) -> None:
    """CASES A (pytorch#170573): the rows of another request were overwritten."""
    first = take(pool, 128)
    victim = published(pool, 128, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, UserWarning)):
            torch.randn(200, 8, out=pool.view(first)["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):
            torch.randn(200, 8, out=pool.view(first)["x"])
    with pytest.raises(RuntimeError):
        pool.view(first)["x"].resize_(300, 8)
    with pytest.raises(RuntimeError):
        torch.as_strided(pool.view(first)["x"], (300, 8), (8, 1))
    assert values(pool, victim) == {3.0}


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_a_copy_of_a_view_holds_its_own_bytes_and_no_others(pool: BlockPool, how: str) -> None:
    """CASES A (pytorch#65604): 256 bytes became 16.8 MB, with other requests' content."""
    secret = take(pool, 500)
    pool.view(secret)["x"].fill_(123.0)
    handle = take(pool, 8)
    tensor = pool.view(handle)["x"]
    tensor.fill_(1.0)
    if how == "pickle":
        data = pickle.dumps(tensor)
        twin = pickle.loads(data)
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        data = buffer.getvalue()
        twin = torch.load(io.BytesIO(data))
    else:
        twin = copy.deepcopy(tensor)
        data = bytes(twin.untyped_storage().nbytes())
    assert len(data) < tensor.numel() * 4 + ENVELOPE
    pool.view(handle)["x"].fill_(2.0)
    assert set(twin.flatten().tolist()) == {1.0}


def test_a_write_with_gradients_makes_no_other_request_part_of_the_graph(pool: BlockPool) -> None:
    """CASES A (pytorch#20275): the whole field required gradients for ever."""
    weight = torch.ones(8, requires_grad=True)
    view = pool.view(take(pool, 5))
    try:
        view["x"].copy_(torch.ones(5, 8) * weight)
    except RuntimeError:
        pass  # a refusal is as good
    for tensor in (view["x"], pool.view(take(pool, 5))["x"], pool.field("x")):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None


def test_a_view_that_was_taken_in_inference_mode_leaves_later_ones_writable(
    pool: BlockPool,
) -> None:
    """CASES A (sglang#33470): every later write outside raised."""
    with torch.inference_mode():
        inside = take(pool, 5)
        pool.view(inside)["x"].fill_(1.0)
        with pool.open(pool.publish(inside)) as lease:
            assert lease["x"].sum() == 40
        pool.view(take(pool, 5)).aux[0] = 3
    handle = take(pool, 5)
    pool.view(handle)["x"].fill_(2.0)
    pool.view(handle).aux[0] = 5
    pool.view(handle)["x"].add_(1.0)
    assert values(pool, pool.publish(handle)) == {3.0}


def test_what_is_read_in_inference_mode_can_be_trained_on_outside(pool: BlockPool) -> None:
    with torch.inference_mode(), pool.open(published(pool, 5, 1.0)) as lease:
        _ = lease["x"]
    with pool.open(published(pool, 5, 2.0)) as lease:
        weight = torch.ones(8, requires_grad=True)
        (lease["x"] * weight).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert set(weight.grad.tolist()) == {10.0}


def test_a_view_used_after_publish_or_free_is_an_error(pool: BlockPool) -> None:
    """CASES J: it wrote, unchecked, into what was another's by then."""
    handle = take(pool, 5)
    view = pool.view(handle)
    _ = view["x"]
    pool.publish(handle)
    with pytest.raises(InvalidStateError):
        _ = view["x"]
    with pytest.raises(InvalidStateError):
        _ = view.aux
    handle = take(pool, 5)
    view = pool.view(handle)
    pool.free(handle)
    with pytest.raises(InvalidStateError):
        _ = view["x"]


def test_a_lease_used_after_its_release_is_an_error(pool: BlockPool) -> None:
    with pool.open(published(pool, 5, 1.0)) as lease:
        view = lease.view
        assert dict(view).keys() == {"x", "m", "raw"}
    for late in (lease, view):
        with pytest.raises(InvalidStateError):
            _ = late["x"]
        with pytest.raises(InvalidStateError):
            _ = late.aux


def test_views_of_one_request_share_memory_and_those_of_two_do_not(pool: BlockPool) -> None:
    handle, other = take(pool, 5), take(pool, 5)
    pool.view(other)["x"].zero_()
    first, second = pool.view(handle)["x"], pool.view(handle)["x"]
    first.fill_(4.0)
    assert torch.equal(second, torch.full((5, 8), 4.0))
    assert not pool.view(other)["x"].any()
    pool.view(handle)["m"].copy_(torch.arange(15, dtype=torch.int32).reshape(3, 5))
    assert pool.view(handle)["m"].tolist()[1] == [5, 6, 7, 8, 9]


def test_setting_the_data_of_a_tensor_moves_that_tensor_and_nothing_else(pool: BlockPool) -> None:
    handle = take(pool, 5)
    tensor = pool.view(handle)["x"]
    tensor.fill_(1.0)
    tensor.data = torch.zeros(5, 8)
    tensor.set_(torch.full((5, 8), 9.0).untyped_storage())
    assert set(pool.view(handle)["x"].flatten().tolist()) == {1.0}


def test_a_write_into_a_lease_faults_with_its_cause_and_reaches_no_other_reader(
    program: Program,
) -> None:
    """CASES J: an in-place write by one reader was seen by all."""
    output = program.run(
        """
        import torch

        pool = BlockPool.create(NAME, CONFIG)
        handle = pool.alloc(5)
        fill(pool.view(handle), 7)
        lease = pool.open(pool.publish(handle, readers=2))
        writer = os.fork()
        if writer == 0:
            with pool.open(lease.handle) as mine:
                mine["x"].fill_(8)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]), read(lease))
        lease.release()
        pool.reap()
        print(pool.available_blocks(), people(pool))
        """
    )
    assert output == f"{-signal.SIGSEGV} 7\n16 1 here, 0 dead\n"


def test_a_pool_without_read_only_leases_says_so_and_lets_readers_write(program: Program) -> None:
    assert (
        program.run("""
            pool = BlockPool.create(NAME, CONFIG, read_only_leases=False)
            handle = pool.alloc(5)
            fill(pool.view(handle), 7)
            with pool.open(pool.publish(handle)) as lease:
                lease["x"].fill_(0x08080808)
                print(read(lease))
        """)
        == "8\n"
    )


def test_a_view_on_a_queue_of_torch_arrives_as_a_copy_of_its_own_rows(program: Program) -> None:
    """CASES A: sending it swapped the storage under the pool."""
    assert (
        program.run("""
            import torch
            import torch.multiprocessing as multiprocessing

            def look(queue, answers):
                tensor = queue.get()
                answers.put((int(tensor.sum()), tensor.untyped_storage().nbytes()))
                tensor.fill_(99)
                answers.put("written")

            if __name__ == "__main__":
                context = multiprocessing.get_context("fork")
                pool = BlockPool.create(NAME, CONFIG)
                queue, answers = context.Queue(), context.Queue()
                child = context.Process(target=look, args=(queue, answers))
                child.start()
                handle = pool.alloc(5)
                pool.view(handle)["x"].fill_(2)
                try:
                    queue.put(pool.view(handle)["x"])
                    print(answers.get(timeout=30), answers.get(timeout=30))
                finally:
                    child.join()
                later = pool.alloc(5)
                pool.view(later)["x"].fill_(3)
                with pool.open(pool.publish(later)) as lease:
                    print(int(lease["x"].sum()), set(bytes(lease.memory("x"))) == {3, 0})
                print(int(pool.view(handle)["x"].sum()))
        """)
        == "(40, 80) written\n60 True\n40\n"
    )


def test_a_reader_in_another_process_sees_what_was_written_after_torch_shared_a_view(
    program: Program,
) -> None:
    """CASES A, as it was reported: the readers saw zeros and nobody got an error."""
    assert (
        program.run("""
            import torch

            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 4, message_type=BlockHandle)
            reader = os.fork()
            if reader == 0:
                print(receive(pool, queue), flush=True)
                os._exit(0)
            handle = pool.alloc(4)
            try:
                pool.view(handle)["x"].share_memory_()
            except RuntimeError:
                pass
            pool.free(handle)
            handle = pool.alloc(4)
            pool.view(handle)["x"].fill_(0x05050505)
            queue.put(pool.publish(handle))
            os.waitpid(reader, 0)
        """)
        == "5\n"
    )
