"""What the processes of the NIXL tests do; they import no torch."""

from __future__ import annotations

import ctypes
import os
import time

from shmblocks import BlockHandle, BlockPool, ShmBlocksError
from shmblocks.nodes import NodeServer, RemotePool, nixl_agent
from shmblocks.nodes.connections import Connections
from shmblocks.nodes.dialing import Dialer
from shmblocks.nodes.messages import Granted, Read
from tests.nodes.kit import KEY
from tests.nodes.nixl_kit import agent_of, use_fake_agents
from tests.support.children import Channel


def serve(channel: Channel, name: str, patience: float, is_fake: bool) -> None:
    """Serve a pool until the test says otherwise; tells the address and the agent's pid."""
    if is_fake:
        use_fake_agents()
    with (
        BlockPool.attach(name, role="server", prefault="off") as pool,
        NodeServer(pool, ("127.0.0.1", 0), key=KEY, patience=patience, nixl=True) as server,
    ):
        channel.say((server.address, agent_of(server)))
        channel.hear("end")


def fetch(
    channel: Channel,
    name: str,
    address: tuple[str, int],
    handles: tuple[BlockHandle, BlockHandle],
    timeout: float,
    is_fake: bool,
) -> None:
    """Fetch the first handle, tell the agent's pid, and fetch the second; tell what came of it."""
    if is_fake:
        use_fake_agents()
    with (
        BlockPool.attach(name, role="reader", prefault="off") as pool,
        RemotePool(pool, address, key=KEY, engine="nixl") as remote,
    ):
        pool.free(remote.fetch(handles[0], timeout=timeout))
        channel.say(agent_of(remote))
        try:
            channel.say(remote.fetch(handles[1], timeout=timeout))
        except ShmBlocksError as error:
            channel.say(type(error).__name__)


def write_over(address: tuple[str, int], handle: BlockHandle) -> str:
    """A reader that has the key, asks where the rows are, and writes there; the error that it got.

    It takes an agent of NIXL into its own process, as none of ours does.
    """
    os.environ.update(nixl_agent.environment(10.0, "lo"))
    connections = Connections(1, "the peer")
    stream, _ = Dialer(address, KEY, None, 10.0, connections).dial(None, connections.watch)
    stream.send(Read(1, handle.encode(), 0, 1), None)
    granted = stream.receive(None, Granted)
    memory = ctypes.create_string_buffer(b"overwritten!")
    there, here = granted.addresses[0], ctypes.addressof(memory)
    made = nixl_agent.NixlAgent("a peer", [(here, len(memory))])
    agent = made._agent
    remote = agent.add_remote_agent(granted.metadata)
    descriptions = [agent.get_xfer_descs([(at, 12, 0)], "DRAM") for at in (here, there)]
    try:
        writing = agent.initialize_xfer("WRITE", *descriptions, remote, b"")
        state = agent.transfer(writing)
        # Small writes are done before they have arrived: what comes next tells.
        while state in ("PROC", "DONE"):
            time.sleep(0.001)
            state = agent.check_xfer_state(writing)
            if state == "DONE":
                state = agent.transfer(writing)
        return str(state)
    except Exception as error:  # noqa: BLE001 - its name is the result
        return type(error).__name__
    finally:
        stream.close()
