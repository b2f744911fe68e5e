"""What an operator may set in `ec_connector_extra_config`; an unknown key is an error at start."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shmblocks.cache import byte_config
from shmblocks.config import MAX_SECONDS, PoolConfig


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
        return config

    def pool_config(self) -> PoolConfig:
        """The config of the pool, alike in every process of every instance."""
        try:
            return byte_config(
                self.pool_bytes, block_bytes=self.block_bytes, group=self.group, device=self.device
            )
        except ValueError as error:
            raise ValueError(f"ec_connector_extra_config: {error}") from None
