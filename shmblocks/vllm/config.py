"""What an operator may set in `ec_connector_extra_config`; an unknown key is an error at start."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

import msgspec

from shmblocks.cache import byte_config
from shmblocks.config import MAX_SECONDS, PoolConfig

# Nodes of a list. A scheduler's hook looks for a key's owner among them, which takes 1.3 us a node.
# More: hooks that take longer than the 200 us that they may. Less: smaller groups of nodes.
MAX_NODES = 64


class ConnectorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of `ec_connector_extra_config`.

    pool                 name of the pool; instances with one name share their encodings
    pool_bytes           its size in bytes, the same for every instance (and for `shmblocks keep`)
    block_bytes          a multiple of 4096; what an item takes is rounded up to it
    group                a Unix group that may use the pool too (containers with several users)
    device               `cpu`: shared memory, which CUDA workers pin; `cuda:N`: memory of that GPU
    wait_seconds         how long a request waits for another instance that encodes its item
    hold_seconds         how long an item that an encode-only instance has announced is kept
    in_place             CPU: the engine's encoder cache holds the pool's memory, no copy
    namespace            instances with another text share nothing (tenants)
    only_content_hashes  share items under content hashes alone, never under a client's own uuid
    nodes                HOST:PORT of each node that shares what it has (`shmblocks serve` there);
                         the same list on every node, this one may be among them
    nodes_key_file       its bytes are the key between the nodes; else SHMBLOCKS_KEY_FILE names it
    """

    pool: str = "vllm-ec"
    pool_bytes: int = 1 << 30
    block_bytes: int = 64 * 1024
    group: str | None = None
    device: str = "cpu"
    wait_seconds: float = 10.0
    hold_seconds: float = 60.0
    in_place: bool = False
    namespace: str = ""
    only_content_hashes: bool = False
    nodes: tuple[str, ...] = ()
    nodes_key_file: str | None = None

    @classmethod
    def of(cls, extra: Mapping[str, object]) -> ConnectorConfig:
        """Checked; ValueError names the key, and what is known."""
        unknown = sorted(set(extra) - set(cls.__struct_fields__))
        if unknown:
            raise ValueError(
                f"ec_connector_extra_config: unknown {', '.join(unknown)}; expected "
                f"{', '.join(cls.__struct_fields__)}"
            )
        try:
            config = msgspec.convert(dict(extra), cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"ec_connector_extra_config: {error}") from None
        for name in ("wait_seconds", "hold_seconds"):
            value = getattr(config, name)
            if not 0 <= value <= MAX_SECONDS:
                raise ValueError(
                    f"ec_connector_extra_config: {name}: expected seconds from 0 to "
                    f"{MAX_SECONDS:g}, got {value}"
                )
        config.pool_config()  # what it refuses is told now
        try:
            config._require_nodes()
        except ValueError as error:
            raise ValueError(f"ec_connector_extra_config: {error}") from None
        return config

    def _require_nodes(self) -> None:
        """ValueError for nodes that could never be asked."""
        if not self.nodes:
            if self.nodes_key_file is not None:
                raise ValueError("nodes_key_file: expected `nodes` with it, whom the key is for")
            return
        # Here: who has one node needs no network.
        from shmblocks.nodes.address import checked_address

        if len(self.nodes) > MAX_NODES:
            raise ValueError(
                f"nodes: expected at most {MAX_NODES}, got {len(self.nodes)}: make groups of nodes"
            )
        for node in self.nodes:
            try:
                _, port = checked_address(node)
            except ValueError as error:
                raise ValueError(f"nodes: {error}") from None
            if port == 0:
                raise ValueError(f"nodes: expected the port that the node listens at, got {node!r}")
        if self.pool_config().is_on_gpu:
            raise ValueError(
                f"nodes: expected device 'cpu' with it, got {self.device!r}: nodes share pools in "
                "host memory"
            )
        if not self.wait_seconds:
            raise ValueError(
                "nodes: expected wait_seconds above 0 with it: a request waits for what is fetched"
            )

    def nodes_key(self) -> bytes | None:
        """The key between the nodes; None: they are all of this machine. ValueError says what is
        wrong with its file, or that there is none."""
        from shmblocks.nodes.address import parse_address
        from shmblocks.nodes.handshake import checked_key, key_from_environment

        path = self.nodes_key_file
        try:
            key = key_from_environment() if path is None else checked_key(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"ec_connector_extra_config: nodes_key_file: {error}") from None
        if key is None and not all(_is_loopback(parse_address(node)[0]) for node in self.nodes):
            raise ValueError(
                "ec_connector_extra_config: nodes_key_file: expected the file of a key, the same "
                "on all nodes: without one only nodes at 127.0.0.1 and ::1 can be asked"
            )
        return key

    def pool_config(self) -> PoolConfig:
        """The config of the pool, alike in every process of every instance."""
        try:
            return byte_config(
                self.pool_bytes, block_bytes=self.block_bytes, group=self.group, device=self.device
            )
        except ValueError as error:
            raise ValueError(f"ec_connector_extra_config: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
