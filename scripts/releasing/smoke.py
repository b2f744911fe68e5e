"""Uses an installed shmblocks as a user would, outside of a checkout.

It is copied away and run there by `scripts/release-check`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig, _core

NAME = f"release-check-{os.getpid()}"


def double(
    pool: BlockPool, queue: HandleQueue[BlockHandle], done: HandleQueue[BlockHandle]
) -> None:
    """In a second process: read in place, send back twice as much."""
    with pool.open(queue.get(timeout=60)) as lease:
        done.put(pool.put({"x": lease["x"] * 2}))


def main() -> None:
    require_installed()
    import torch

    config = PoolConfig(total_tokens=1024, fields=(Field("x", (8,), "fp32"),))
    with (
        BlockPool.create(NAME, config, role="smoke") as pool,
        HandleQueue.create(f"{NAME}-there", message_type=BlockHandle) as there,
        HandleQueue.create(f"{NAME}-back", message_type=BlockHandle) as back,
    ):
        spawn = multiprocessing.get_context("spawn")
        child = spawn.Process(target=double, args=(pool, there, back))
        child.start()
        there.put(pool.put({"x": torch.ones(200, 8)}))
        answer = pool.take(back.get(timeout=60))["x"]
        child.join(60)
        require(child.exitcode == 0, f"the second process ended with {child.exitcode}")
        require(bool((answer == 2).all()), f"expected twos, got {answer}")
        require(pool.check() == [], f"violations: {pool.check()}")
        require(NAME in listed(), f"`shmblocks ls` does not list {NAME}")
    require(NAME not in listed(), f"`shmblocks ls` lists {NAME} after everybody left")
    core = "with the compiled core" if _core.is_used() else f"by Python alone: {_core.why_not}"
    require(_core.is_used() or "--needs-core" not in sys.argv, core)
    version = importlib.metadata.version("shmblocks")
    print(f"shmblocks {version}: installed, used {core}, nothing left")


def require_installed() -> None:
    spec = importlib.util.find_spec("shmblocks")
    where = Path(spec.origin or "") if spec is not None else Path()
    installed = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    require(any(map(where.is_relative_to, installed)), f"expected it in {installed}, got {where}")
    require((where.parent / "py.typed").exists(), "py.typed is missing")


def listed() -> set[str]:
    """Names that the installed command prints."""
    ran = subprocess.run(["shmblocks", "ls", "--json"], capture_output=True, text=True, check=True)
    return {pool["name"].removeprefix("/") for pool in json.loads(ran.stdout)["pools"]}


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"release-check: {otherwise}")


if __name__ == "__main__":
    main()
