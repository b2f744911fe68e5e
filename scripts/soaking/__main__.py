"""The command line of `scripts/soak`."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time

from soaking.launcher import Settings, soak


def main() -> int:
    """0 when nothing was violated, else 1."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--kill-rate", type=float, default=4.0, help="kills per second")
    parser.add_argument("--stop-rate", type=float, default=1.0, help="stops per second")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--name", default=f"soak-{os.getpid()}", help="of the pool")
    parser.add_argument(
        "--pace", type=float, default=0.0, help="ms of rest between two operations of a worker"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.processes < 3:
        parser.error("--processes: expected at least 3 (a pair and a mixer)")
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    started = time.monotonic()
    settings = Settings(
        options.processes,
        options.minutes * 60,
        options.kill_rate,
        options.stop_rate,
        seed,
        options.name,
        options.pace / 1000,
    )
    verdict = soak(settings)
    report = {
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "processes": options.processes,
        "kills": verdict.kills,
        "stops": verdict.stops,
        "reclaimed_blocks": verdict.reclaimed_blocks,
        **verdict.counts,
        "worst_wait_ms": round(verdict.counts["worst_wait"] / 1e6, 1),
        "worst_notice_ms": round(verdict.counts["worst_notice"] / 1e6, 1),
        "violations": len(verdict.violations),
    }
    for key in ("worst_wait", "worst_notice"):
        del report[key]
    if options.json:
        print(json.dumps({**report, "messages": verdict.violations}))
    else:
        print("\n".join(f"{key:>18}  {value}" for key, value in report.items()))
        print("\n".join(verdict.violations))
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
