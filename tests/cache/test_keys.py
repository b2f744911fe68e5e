"""Keys: what they are made of, and which are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shmblocks import UNBOUNDED, BlockPool, Namespace, content_key
from tests.cache import kit

NAMESPACE = Namespace(model="encoder", revision="1", dtype="bf16")


def test_a_key_has_16_bytes_and_is_the_same_in_every_process() -> None:
    code = "from tests.cache.test_keys import NAMESPACE; print(NAMESPACE.key('picture').hex())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(NAMESPACE.key("picture")) == 16
    assert run.stdout.strip() == NAMESPACE.key("picture").hex()


@pytest.mark.parametrize(
    "other",
    [
        Namespace(model="encoder2", revision="1", dtype="bf16"),
        Namespace(model="encoder", revision="2", dtype="bf16"),
        Namespace(model="encoder", revision="1", dtype="fp16"),
        Namespace(model="encoder", revision="1", dtype="bf16", config="int8"),
        Namespace(model="encoder", revision="1", dtype="bf16", salt="tenant"),
        Namespace(model="encoder1", revision="", dtype="bf16"),
    ],
)
def test_whatever_shapes_the_output_is_part_of_the_key(other: Namespace) -> None:
    assert other.key("picture") != NAMESPACE.key("picture")


def test_the_epoch_and_the_identifier_are_part_of_the_key() -> None:
    keys = {NAMESPACE.key(name, epoch=epoch) for name in ("a", "b") for epoch in (0, 1)}
    assert len(keys) == 4


def test_namespace_and_identifier_cannot_be_shifted_into_each_other() -> None:
    assert content_key(b"ab", b"c") != content_key(b"a", b"bc")
    assert content_key(b"", b"abc") != content_key(b"abc", b"")


def test_an_identifier_may_be_text_or_bytes() -> None:
    assert content_key(b"n", "id") == content_key(b"n", b"id")
    with pytest.raises(TypeError, match="identifier: expected str or bytes"):
        content_key(b"n", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="namespace: expected bytes"):
        content_key("n", "id")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [16, 32])
def test_a_key_of_16_or_32_bytes_is_found(pool: BlockPool, size: int) -> None:
    key = bytes(range(size))
    handle = pool.publish(kit.reserve(pool), readers=UNBOUNDED, key=key)
    found = pool.find(key)
    assert found is not None
    assert found.handle == handle
    assert pool.entries()[0].key[:size] == key


@pytest.mark.parametrize("size", [0, 15, 17, 31, 33])
def test_a_key_of_another_size_is_refused_and_nothing_is_changed(
    pool: BlockPool, size: int
) -> None:
    handle = kit.reserve(pool)
    with pytest.raises(ValueError, match="key: expected 16 or 32 bytes"):
        pool.publish(handle, readers=UNBOUNDED, key=bytes(size))
    for call in (pool.find, pool.touch, pool.get, pool.drop, pool.claim, pool.end_claim):
        with pytest.raises(ValueError, match="16 or 32"):
            call(bytes(size))
    pool.free(handle)


def test_a_key_that_is_no_bytes_is_refused(pool: BlockPool) -> None:
    with pytest.raises(TypeError, match="key: expected bytes, got str"):
        pool.find("0" * 16)  # type: ignore[arg-type]


def test_keys_with_the_same_first_half_are_two_keys(pool: BlockPool) -> None:
    first, second = bytes(16), bytes(15) + b"\1"
    kit.put(pool, first)
    assert not kit.is_there(pool, second)
    assert kit.is_there(pool, first)


def test_after_a_new_epoch_new_keys_reach_nothing_old(pool: BlockPool) -> None:
    before = NAMESPACE.key("picture", epoch=pool.epoch)
    kit.put(pool, before)
    assert pool.bump_epoch() == 1
    after = NAMESPACE.key("picture", epoch=pool.epoch)
    assert not kit.is_there(pool, after)
    assert kit.is_there(pool, before)
    assert pool.cache_stats().epoch == 1


def test_every_process_sees_the_new_epoch(pool: BlockPool) -> None:
    with BlockPool.attach(pool.name, prefault="off") as other:
        other.bump_epoch()
        assert pool.epoch == other.epoch == 1
