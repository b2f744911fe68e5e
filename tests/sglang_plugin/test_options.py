"""Pixels in the pool, and SGLang's embedding store over the content cache."""

from __future__ import annotations

import ctypes
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Protocol

import pytest
import torch

from shmblocks.sglang_plugin import pixels, store
from shmblocks.sglang_plugin.attachment import Attachment
from shmblocks.sglang_plugin.loading import load
from shmblocks.sglang_plugin.process import process
from tests.sglang_plugin import kit


class ShmPointerMMData:
    """SGLang's class; its "segment" is a clone."""

    segments: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def __init__(self, tensor: torch.Tensor, precomputed_hash: int | None = None) -> None:
        self._shm_handle: object = None
        self.tensor: torch.Tensor | None = None
        self._materialization_error: str | None = None
        self.shape, self.dtype, self.precomputed_hash = tensor.shape, tensor.dtype, precomputed_hash
        self.shm_name = f"segment {len(self.segments)}"
        self.segments[self.shm_name] = tensor.clone()

    def __getstate__(self) -> dict[str, object]:
        names = ("shm_name", "shape", "dtype", "precomputed_hash")
        return {name: vars(self)[name] for name in names}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._shm_handle, self._materialization_error = None, None
        self.tensor = self.segments[self.shm_name]

    def materialize(self) -> torch.Tensor:
        try:
            assert self.tensor is not None
            return self.tensor.clone()
        finally:
            self.close_and_unlink()

    def close_and_unlink(self) -> None:
        self.segments.pop(self.shm_name, None)

    def __del__(self) -> None:
        self._shm_handle = None


class Pixels(Protocol):
    """As this test uses the class."""

    attachment: Attachment

    def __call__(self, tensor: torch.Tensor, precomputed_hash: int | None = None) -> PixelData: ...


class PixelData(Protocol):
    tensor: torch.Tensor | None
    precomputed_hash: int | None

    def materialize(self) -> torch.Tensor: ...

    def close_and_unlink(self) -> None: ...


@pytest.fixture
def sglang() -> Iterator[dict[str, types.ModuleType]]:
    with kit.installed() as made:
        made["sglang.srt.managers.mm_utils"].ShmPointerMMData = kit.fresh(  # type: ignore[attr-defined]
            ShmPointerMMData
        )
        ShmPointerMMData.segments.clear()
        yield made


@pytest.fixture
def data(sglang: dict[str, types.ModuleType], pool_name: str) -> Iterator[Pixels]:
    """The class that replaces SGLang's, where pickle finds it."""
    made = pixels.make_class(kit.settings(pool_name))
    module = sglang["sglang.srt.managers.mm_utils"]
    # Pickle asks by name.
    module.ShmPointerMMData = made  # type: ignore[attr-defined]
    yield made  # type: ignore[misc]
    made.attachment.close()  # type: ignore[attr-defined]


def sent(there: PixelData) -> PixelData:
    """As another process gets it."""
    found: PixelData = pickle.loads(pickle.dumps(there))
    return found


def free(data: Pixels) -> int:
    pool = data.attachment.pool()
    assert pool is not None
    assert pool.check() == []
    return pool.available_blocks()


def picture() -> torch.Tensor:
    return torch.arange(3 * 224 * 100, dtype=torch.float32).view(3, 224, 100)


def test_pixels_cross_as_blocks_and_are_the_receivers_own(data: Pixels) -> None:
    there = data(picture(), 17)
    before = free(data)
    came = sent(there)
    assert came.precomputed_hash == 17
    seen = came.tensor
    assert seen is not None
    assert torch.equal(seen, picture())
    mine = came.materialize()
    mine.fill_(1)
    assert free(data) == before, "the blocks last as long as the memory"
    del mine, seen
    assert free(data) == 64
    assert ShmPointerMMData.segments == {}


def test_each_of_several_ranks_keeps_what_it_has_mapped(data: Pixels) -> None:
    there = data(picture())
    first, second = sent(there), sent(there)
    mine = first.materialize()
    theirs = second.materialize()
    mine.fill_(1)
    assert torch.equal(theirs, picture())
    late = sent(there)
    with pytest.raises(RuntimeError, match=r"StaleHandleError|InvalidStateError"):
        late.materialize()
    del mine, theirs
    assert free(data) == 64


def test_pixels_that_nobody_materializes_are_closed_and_dropped(data: Pixels) -> None:
    there = data(picture())
    came = sent(there)
    del came
    assert free(data) < 64
    there.close_and_unlink()
    assert free(data) == 64
    there.close_and_unlink()


def test_without_free_blocks_a_segment_of_sglangs_is_used(data: Pixels) -> None:
    pool = data.attachment.pool()
    assert pool is not None
    with pool.reserve(pool.config.total_tokens):
        there = data(picture())
        came = sent(there)
        assert torch.equal(came.materialize(), picture())
        del there, came
    assert ShmPointerMMData.segments == {}
    assert process.counters.failed == 0


def test_a_tensor_larger_than_the_pool_is_a_segment_of_sglangs(data: Pixels) -> None:
    there = data(torch.zeros(2 << 20, dtype=torch.float32))
    assert len(ShmPointerMMData.segments) == 1
    there.close_and_unlink()


def test_the_class_is_known_by_sglangs_name(data: Pixels) -> None:
    made: object = data
    assert isinstance(made, type)
    assert (made.__module__, made.__qualname__) == (
        "sglang.srt.managers.mm_utils",
        "ShmPointerMMData",
    )


# --- the store --------------------------------------------------------------------------------


class EmbeddingStore:
    """SGLang's abstract class."""


class Factory:
    def __init__(self) -> None:
        self.backends: dict[str, tuple[str, str]] = {}

    def register_backend(self, name: str, module: str, cls: str) -> None:
        self.backends[name] = (module, cls)


@pytest.fixture
def made_store(
    sglang: dict[str, types.ModuleType], pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[store.PoolStore]:
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL", pool_name)
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL_MB", "4")
    monkeypatch.setenv("SHMBLOCKS_SGLANG_STORE", "1")
    vars(sglang["sglang.srt.mem_cache.embedding_store"]).update(
        EmbeddingStore=EmbeddingStore, EmbeddingStoreFactory=Factory()
    )
    model = types.SimpleNamespace(model_path="a model", revision=None)
    vars(sglang["sglang.srt.runtime_context"]).update(get_model=lambda: model)
    monkeypatch.delitem(vars(store), store.CLASS, raising=False)
    load_store(sglang)
    module, name = sglang["sglang.srt.mem_cache.embedding_store"].EmbeddingStoreFactory.backends[
        "mooncake"
    ]
    kind = getattr(sys.modules[module], name)
    assert issubclass(kind, EmbeddingStore)
    found: store.PoolStore = kind()
    yield found
    found._attachment.close()
    monkeypatch.delitem(vars(store), store.CLASS, raising=False)


def load_store(sglang: dict[str, types.ModuleType]) -> None:
    """Through the entry point, as SGLang does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda _: "0.5.23")
        load()
    assert sglang["sglang.srt.plugins.hook_registry"].HookRegistry.hooks


def buffer(size: int, fill: int = 0) -> ctypes.Array[ctypes.c_char]:
    made = ctypes.create_string_buffer(size)
    ctypes.memset(made, fill, size)
    return made


def address(memory: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(memory)


def test_what_one_encoder_puts_another_gets(made_store: store.PoolStore, pool_name: str) -> None:
    size = 100_000
    source = buffer(size, 7)
    assert made_store.batch_is_exist(["a", "b"]) == [False, False]
    assert made_store.batch_put(["a"], [address(source)], [size]) == [True]
    other = store.PoolStore()
    try:
        target = buffer(size)
        assert other.batch_is_exist(["a", "b"]) == [True, False]
        assert other.batch_get(["a", "b"], [address(target)] * 2, [size] * 2) == [True, False]
        assert target.raw == source.raw
    finally:
        other._attachment.close()
    assert made_store.get_key("a") == "emb_a"
    made_store.register_buffer(torch.zeros(1))


def test_an_entry_is_copied_from_and_to_several_buffers(made_store: store.PoolStore) -> None:
    parts = [buffer(5000, 1), buffer(3, 2), buffer(9000, 3)]
    sizes = [len(each) for each in parts]
    pointers = [address(each) for each in parts]
    assert made_store.batch_put_from_multi_buffers(["a"], [pointers], [sizes]) == [True]
    target = buffer(sum(sizes))
    assert made_store.batch_get(["a"], [address(target)], [sum(sizes)]) == [True]
    assert target.raw == b"".join(each.raw for each in parts)
    back = [buffer(size) for size in sizes]
    into = [address(each) for each in back]
    assert made_store.batch_get_into_multi_buffers(["a"], [into], [sizes]) == [True]
    assert [each.raw for each in back] == [each.raw for each in parts]


def test_an_entry_of_another_length_is_not_there(made_store: store.PoolStore) -> None:
    source, target = buffer(100, 7), buffer(99)
    made_store.batch_put(["a"], [address(source)], [100])
    assert made_store.batch_get(["a"], [address(target)], [99]) == [False]
    assert target.raw == bytes(99)


def test_putting_twice_is_no_error_and_a_full_store_evicts(made_store: store.PoolStore) -> None:
    size = 1 << 20
    source = buffer(size, 7)
    names = [str(number) for number in range(8)]
    for name in names:
        assert made_store.batch_put([name], [address(source)], [size]) == [True]
        assert made_store.batch_put([name], [address(source)], [size]) == [True]
    there = made_store.batch_is_exist(names)
    assert there == [False] * 4 + [True] * 4
    huge = buffer(5 << 20)
    assert made_store.batch_put(["x", "y"], [address(huge), 0], [5 << 20, 0]) == [False, False]


def test_another_model_does_not_see_it(
    made_store: store.PoolStore, sglang: dict[str, types.ModuleType]
) -> None:
    source = buffer(100, 7)
    made_store.batch_put(["a"], [address(source)], [100])
    model = types.SimpleNamespace(model_path="another model", revision="1")
    vars(sglang["sglang.srt.runtime_context"]).update(get_model=lambda: model)
    other = store.PoolStore()
    try:
        assert other.batch_is_exist(["a"]) == [False]
    finally:
        other._attachment.close()


def test_without_the_pool_nothing_is_found_or_entered(made_store: store.PoolStore) -> None:
    source = buffer(100, 7)
    made_store._attachment.close()
    made_store._attachment._next_attempt = float("inf")
    assert made_store.batch_put(["a"], [address(source)], [100]) == [False]
    assert made_store.batch_get(["a"], [address(source)], [100]) == [False]
    assert made_store.batch_is_exist(["a"]) == [False]
