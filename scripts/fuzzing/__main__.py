"""The command line of `scripts/fuzz`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import torch

from fuzzing.handles import fuzz_handles
from fuzzing.messages import fuzz_messages
from fuzzing.segments import fuzz_living, fuzz_segments
from shmblocks import PoolNotFoundError, remove_pool

# Seconds after which a run of one part is called a hang.
HANG = 1800.0

Part = Callable[[str, int, random.Random], dict[str, int]]

# Share of the inputs that each part gets; a segment costs as much as a thousand handles.
PARTS: tuple[tuple[str, Part, float], ...] = (
    ("handles", fuzz_handles, 0.9),
    ("messages", fuzz_messages, 0.095),
    ("segments", fuzz_segments, 0.004),
    ("living pools", fuzz_living, 0.001),
)


def main() -> int:
    """0 when everything was an error of ours or a right answer; else the exception is shown."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--name", default=f"fuzz-{os.getpid()}", help="of the pools")
    parser.add_argument(
        "--guided", type=int, default=0, metavar="RUNS", help="coverage-guided, with atheris"
    )
    options = parser.parse_args()
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    # Leases of the handles' scene are dropped on purpose.
    warnings.simplefilter("ignore", ResourceWarning)
    for title, part, share in PARTS:
        faulthandler.dump_traceback_later(HANG, exit=True)
        started = time.monotonic()
        inputs = max(1, int(options.inputs * share))
        counts = part(
            f"{options.name}-{title.replace(' ', '-')}", inputs, random.Random(f"{seed} {title}")
        )
        found = ", ".join(f"{count} {what}" for what, count in counts.items())
        print(
            f"{title}: {inputs} inputs in {time.monotonic() - started:.0f} s: {found}", flush=True
        )
        faulthandler.cancel_dump_traceback_later()
    return guided(options.guided, seed, f"{options.name}-guided") if options.guided else 0


def guided(runs: int, seed: int, name: str) -> int:
    """Run atheris in an interpreter of its own: it instruments what is imported after it."""
    if importlib.util.find_spec("atheris") is None:
        print("--guided needs atheris: pip install atheris", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "fuzzing.guided", "--runs", str(runs), "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as corpus:
        ended = subprocess.run([*command, "--name", name, "--corpus", corpus], check=False)
    # libFuzzer ends its process on the spot: what it leaves is what the dead leave.
    for left in (name, f"{name}-pairs"):
        with contextlib.suppress(PoolNotFoundError):
            remove_pool(left)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
