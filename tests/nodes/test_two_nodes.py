"""Two nodes that share nothing but a network, which goes down, swallows packets, and comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, cast

import pytest

from _two_nodes import Node, two_nodes, why_not
from shmblocks.nodes import nixl_agent
from tests.nodes import namespaces
from tests.nodes.namespaces import Program, python
from tests.nodes.node_program import CONFIG
from tests.support.children import wait_until

TOKENS = 4096
PATIENCE = 1.0
MODULE = "tests.nodes.node_program"


class Two(NamedTuple):
    first: Node
    second: Node
    publisher: Program
    reader: Program

    def publish(self, num_tokens: int = TOKENS) -> list[str]:
        return cast("list[str]", ask(self.publisher, "publish", num_tokens))

    def fetch(self, handle: str, timeout: float = 30.0) -> list[object]:
        return cast("list[object]", ask(self.reader, "fetch", self.first.address, handle, timeout))


def ask(program: Program, *words: object) -> object:
    program.say(words)
    return program.hear()


@contextlib.contextmanager
def two_programs(engine: str) -> Iterator[Two]:
    with (
        two_nodes() as (first, second),
        python(first, MODULE) as publisher,
        python(second, MODULE) as reader,
    ):
        for node in (first, second):
            # UCX looks there for network interfaces, and would find those of the machine.
            node.run("mount", "-t", "sysfs", "sysfs", "/sys")
        for program in (publisher, reader):
            assert ask(program, "create", PATIENCE, engine) == "/node"
        yield Two(first, second, publisher, reader)


@pytest.fixture(params=["tcp", "nixl"], autouse=True)
def engine(request: pytest.FixtureRequest) -> str:
    if reason := why_not():
        pytest.skip(reason)
    if request.param == "nixl" and not nixl_agent.is_installed():
        pytest.skip("NIXL is not installed (pip install 'shmblocks[nixl]')")
    return str(request.param)


def assert_free(program: Program) -> None:
    wait_until(
        lambda: ask(program, "stats")[:2] == [CONFIG.total_blocks, 0],  # type: ignore[index]
        "every block of the node is free",
        30.0,
    )


def test_pools_of_the_same_name_on_two_nodes_exchange_blocks(engine: str) -> None:
    with two_programs(engine) as two:
        for num_tokens in (1, 64, 1000, TOKENS):
            handle, digest = two.publish(num_tokens)
            assert two.fetch(handle) == ["ok", digest]
        assert_free(two.reader)
        assert_free(two.publisher)


@pytest.mark.parametrize("how", ["link down", "black hole"])
def test_a_network_that_is_gone_is_told_within_patience_or_deadline(how: str, engine: str) -> None:
    with two_programs(engine) as two:
        handle, digest = two.publish()
        small, small_digest = two.publish(1)
        assert two.fetch(small) == ["ok", small_digest]
        if how == "link down":
            namespaces.link(two.first, "down")
        else:
            namespaces.black_hole(two.first)
            namespaces.black_hole(two.second)
        kind, text, _ = two.fetch(handle, 20.0)
        assert kind == "PeerDiedError", text
        assert "10.77.0.1" in str(text)
        # The blocks are others' now: whatever is on its way may not reach them.
        ask(two.reader, "fill")
        if how == "link down":
            namespaces.link(two.first, "up")
        else:
            namespaces.no_black_hole(two.first)
            namespaces.no_black_hole(two.second)
        wait_until(lambda: ask(two.publisher, "stats")[3] == 0, "no lease is held", 30.0)  # type: ignore[index]
        assert ask(two.reader, "unchanged") is True
        assert two.fetch(handle) == ["ok", digest], "the same handle, once the network is back"
        assert_free(two.reader)
        assert_free(two.publisher)


def test_a_killed_node_is_told_and_costs_the_other_nothing(engine: str) -> None:
    with two_programs(engine) as two:
        handle, _ = two.publish()
        two.publisher.kill()
        kind, text, _ = two.fetch(handle, 20.0)
        assert kind == "PeerDiedError", text
        assert_free(two.reader)
