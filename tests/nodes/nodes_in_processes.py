"""What the processes of the death tests do; they import no torch."""

from __future__ import annotations

from shmblocks import BlockHandle, BlockPool, ShmBlocksError
from shmblocks.nodes import NodeServer, RemotePool
from tests.nodes.kit import KEY
from tests.support.children import Channel


def serve(channel: Channel, name: str, patience: float) -> None:
    """Serve a pool until the test says otherwise; what it asks for is the count of given back."""
    with (
        BlockPool.attach(name, role="server", prefault="off") as pool,
        NodeServer(pool, ("127.0.0.1", 0), key=KEY, patience=patience) as server,
    ):
        channel.say(server.address)
        while channel.receive() != "end":
            channel.say(server.stats().given_back)


def fetch(
    channel: Channel, name: str, address: tuple[str, int], handle: BlockHandle, timeout: float
) -> None:
    """Fetch once, and tell what came of it: a handle, or the name of an error."""
    with (
        BlockPool.attach(name, role="reader", prefault="off") as pool,
        RemotePool(pool, address, key=KEY) as remote,
    ):
        channel.say("fetching")
        try:
            channel.say(remote.fetch(handle, timeout=timeout))
        except ShmBlocksError as error:
            channel.say(type(error).__name__)


def publish_and_die(channel: Channel, name: str, num_tokens: int) -> None:
    """A publisher whose blocks outlive it."""
    pool = BlockPool.attach(name, role="publisher", prefault="off")
    with pool.reserve(num_tokens) as reservation:
        memory = reservation.memory("x")
        memory[:] = bytes(index % 251 for index in range(len(memory)))
        reservation.memory("aux")[:] = bytes(64)
        channel.say(reservation.publish())
    channel.receive()
