"""What the environment says; the same for every process of a deployment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from shmblocks.cache import byte_config
from shmblocks.config import PoolConfig

PREFIX = "SHMBLOCKS_SGLANG_"
POOL = PREFIX + "POOL"
# SGLang's own: how long a rank waits for an embedding.
RECEIVE_TIMEOUT = "SGLANG_ENCODER_RECV_TIMEOUT"

# Seconds that a call on SGLang's threads waits for the pool's lock. Smaller: more embeddings go as
# bytes while many processes use the pool. Larger: a stopped process holds up the scheduler longer.
LOCK_TIMEOUT = 0.05
# Seconds that all other calls wait for it: giving back what cannot be kept.
LONGEST_WAIT = 2.0
MAX_PARTICIPANTS = 128
MAX_LEASES = 2048


class Settings(NamedTuple):
    """The variables `SHMBLOCKS_SGLANG_*`.

    pool               POOL: its name
    pool_bytes         POOL_MB, 1024: how large whoever comes first makes it
    min_bytes          MIN_BYTES, 1 MiB: smaller embeddings go as bytes
    unclaimed_timeout  UNCLAIMED_TIMEOUT, SGLang's receive timeout: seconds after which what nobody
                       opened comes back
    guard              GUARD, 1: cure SGLang's crash on a request that fails while it waits
    view               VIEW, 0: the model reads the pool in place; blocks last as long as a request
    pin                PIN, 0: from the GPU straight into the pool, which is pinned
    pixels             PIXELS, 0: pixels in the pool instead of a segment for each tensor
    store              STORE, 0: `--enable-mm-global-cache` in the pool, under the name "mooncake"
    """

    pool: str
    pool_bytes: int = 1 << 30
    min_bytes: int = 1 << 20
    unclaimed_timeout: float = 180.0
    guard: bool = True
    view: bool = False
    pin: bool = False
    pixels: bool = False
    store: bool = False

    def config(self) -> PoolConfig:
        """The pool that every process of the deployment makes or finds."""
        config = byte_config(
            self.pool_bytes, max_leases=MAX_LEASES, max_participants=MAX_PARTICIPANTS
        )
        return msgspec.structs.replace(
            config, unclaimed_timeout=self.unclaimed_timeout, lock_timeout=LONGEST_WAIT
        )


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings | None:
    """What the environment says; None: not to be active. ValueError names the variable."""
    name = environment.get(POOL, "")
    if not name:
        return None
    patience = _number(environment, RECEIVE_TIMEOUT, 180.0)
    return Settings(
        name,
        int(_number(environment, PREFIX + "POOL_MB", 1024.0) * (1 << 20)),
        int(_number(environment, PREFIX + "MIN_BYTES", float(1 << 20), least=0.0)),
        _number(environment, PREFIX + "UNCLAIMED_TIMEOUT", patience),
        _is_on(environment, "GUARD", "1"),
        _is_on(environment, "VIEW"),
        _is_on(environment, "PIN"),
        _is_on(environment, "PIXELS"),
        _is_on(environment, "STORE"),
    )


def _number(
    environment: Mapping[str, str], name: str, default: float, least: float = 1e-3
) -> float:
    text = environment.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value < 1e15:
        raise ValueError(f"environment variable {name}: expected a number > 0, got {text!r}")
    return value


def _is_on(environment: Mapping[str, str], name: str, default: str = "0") -> bool:
    text = environment.get(PREFIX + name) or default
    if text not in ("0", "1"):
        raise ValueError(f"environment variable {PREFIX}{name}: expected 0 or 1, got {text!r}")
    return text == "1"
