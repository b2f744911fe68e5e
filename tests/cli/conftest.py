"""A pool whose picture is known, and a way to run commands in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import msgspec
import pytest

from shmblocks import BlockHandle, BlockPool, Field, PoolConfig, PoolSummary
from shmblocks.cli import commands
from shmblocks.cli.main import main
from shmblocks.inspector import list_segments
from tests.support.children import Channel, Child, fork
from tests.support.naming import worker_prefix

T = TypeVar("T", bound=msgspec.Struct)

CONFIG = PoolConfig(
    total_tokens=128,
    fields=(Field("fill_ids", (), "int32"), Field("positions", (3,), "int32", transposed=True)),
    block_size=4,
    default_num_blocks=4,
)


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str

    def report(self, kind: type[T]) -> T:
        """The JSON document, checked against the type that documents it."""
        assert self.err == ""
        return msgspec.json.decode(self.out, type=kind, strict=True)


Run = Callable[..., Answer]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("stat", name)`: the command line in this process."""

    def run_here(*arguments: str) -> Answer:
        code = main(arguments)
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run_here


@pytest.fixture
def _only_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands for all pools of the node see those of this worker: others are not ours to reap."""

    def mine() -> list[PoolSummary]:
        return [each for each in list_segments() if worker_prefix() in each.name]

    monkeypatch.setattr(commands, "list_segments", mine)


@dataclass
class Scene:
    """A pool of 32 blocks in which every state is to be seen.

    blocks  0-3    reserved   by this process ("embedding"), request "req-1"
            4-11   leased     by the child, one reader to come, request "req-2"
            12-13  published
            14     draining
            15-16  reserved   by the child ("language-0"), request "img-7"
            17-31  free
    """

    pool: BlockPool
    child: Child

    @property
    def name(self) -> str:
        return self.pool.name


@pytest.fixture
def scene(pool_name: str) -> Iterator[Scene]:
    with BlockPool.create(pool_name, CONFIG, role="embedding", prefault="off") as pool:
        must(pool.alloc_default("req-1"))
        shared = pool.publish(must(pool.alloc(30, "req-2")), readers=2)
        pool.publish(must(pool.alloc(8)))
        with drained(pool), fork(live_in, pool_name, shared) as child:
            child.hear("ready")
            yield Scene(pool, child)
            child.kill()


@contextmanager
def drained(pool: BlockPool) -> Iterator[None]:
    """One block that was given back while it is read."""
    handle = pool.publish(must(pool.alloc(4)))
    with pool.open(handle):
        pool.free(handle)
        yield


def live_in(channel: Channel, name: str, shared: BlockHandle) -> None:
    """The child: reads, holds, and waits for its death."""
    pool = BlockPool.attach(name, role="language-0", prefault="off")
    lease = pool.open(shared)
    must(pool.alloc(8, "img-7"))
    channel.say("ready")
    channel.receive(timeout=600.0)
    lease.release()


def must(handle: BlockHandle | None) -> BlockHandle:
    assert handle is not None
    return handle
