"""`scripts/vllm --first-token FOLDER`: how long until the first token of a picture that another
replica has had.

Three engines: one shares nothing; two share a pool, and one of these has encoded every picture
before. The first one and the last one are asked in turns, each about every picture once. The model
is `models.LARGE`: its encoder takes most of the time, as that of a real model does for large
pictures, and its language model takes none. So this is the most that can be won, not what a real
model wins.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from vllm_cases import models, photos
from vllm_cases.engines import Engine, transfer

PICTURES = 24
WARM = 4
POOL_BYTES = 64 << 20


def first_tokens(folder: Path) -> dict[str, list[float]]:
    """Seconds to the first token of each measured picture: alone, and with the shared pool."""
    model = folder / models.LARGE
    if not model.exists():
        subprocess.run([sys.executable, "-m", "vllm_cases.models", models.LARGE, model], check=True)
    config = transfer("ec_both", f"vllm-first-token-{os.getpid()}", pool_bytes=POOL_BYTES)
    names = photos.variants(PICTURES)
    found: dict[str, list[float]] = {"alone": [], "shared": []}
    with (
        Engine("alone", {"model": str(model)}, folder) as alone,
        Engine("first", {"model": str(model), "ec_transfer_config": config}, folder) as first,
        Engine("second", {"model": str(model), "ec_transfer_config": config}, folder) as second,
    ):
        for engine in (alone, first, second):
            engine.ready()
        first.do(ask=[[name] for name in names])
        for number, name in enumerate(names):
            for what, engine in (("alone", alone), ("shared", second)):
                seconds = engine.do(ask=[[name]], max_tokens=1)["seconds"]
                if number >= WARM:
                    found[what].append(seconds)
        hits = second.counted("hits", "misses")
    print(f"the second replica: {hits}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/vllm --first-token", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the model and the logs")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    found = first_tokens(folder)
    for what, seconds in found.items():
        print(f"{what}: median {statistics.median(seconds) * 1e3:.0f} ms of {len(seconds)}")
    ratio = statistics.median(found["alone"]) / statistics.median(found["shared"])
    print(f"the first token comes {ratio:.1f} times sooner")


if __name__ == "__main__":
    main()
