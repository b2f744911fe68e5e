"""Names that no other run of the suite can take: the run's prefix, the worker's, and the seed.

The process that starts a run decides once and tells the others through the environment, which
pytest's parallel workers and every program started by a test inherit. Two runs side by side, in
one checkout or in two, therefore never meet in `/dev/shm`, and each knows its own leftovers.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets

PREFIX_VARIABLE = "SHMBLOCKS_TEST_PREFIX"
SEED_VARIABLE = "SHMBLOCKS_TEST_SEED"

_numbers = itertools.count(1)


def run_prefix() -> str:
    """What every segment of this run has in its name."""
    return os.environ.setdefault(PREFIX_VARIABLE, f"sbtest-{secrets.token_hex(4)}")


def worker_prefix() -> str:
    """What every segment of this pytest process has in its name (ends so that gw1 is not gw10)."""
    return f"{run_prefix()}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-"


def new_pool_name() -> str:
    """A name that no pool has had. It has the pid, since a forked child has the same counter."""
    return f"{worker_prefix()}{os.getpid()}-{next(_numbers)}"


def run_seed() -> int:
    """The seed of this run; the same in all its workers."""
    return int(os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(2**32))))


def random_for(test: str) -> random.Random:
    """Random numbers that depend on the run's seed and the test, not on which tests ran before."""
    return random.Random(f"{run_seed()}:{test}")
