"""Machines, containers and limits that say no: said before anything is allocated, and how to go on.

The shared memory folder, the process's limits, the container's memory, the threads, the clock. Each
test changes them for a process of its own.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shmblocks import BlockPool, Field, HandleQueue, PoolConfig, PoolPermissionError
from shmblocks._os import segment as segment_module
from shmblocks._os.cgroup import tightest_memory_limit
from shmblocks._os.limits import address_space_refusal, container_refusal, refusal_of
from shmblocks._os.process import clock_offset_ns
from shmblocks._os.segment import SHM_DIRECTORY, path_of
from shmblocks.errors import SharedMemoryFullError
from tests.core import namespaces, pools
from tests.support.children import run_in_fork, run_program

MIB = 1 << 20
GIB = 1 << 30


def of_size(mebibytes: int) -> PoolConfig:
    return PoolConfig(
        total_tokens=mebibytes * 1024, block_size=128, fields=(Field("x", (1024,), "uint8"),)
    )


def refused(name: str, config: PoolConfig | None = None) -> str:
    """What creating a pool and a queue says, which leave nothing; with the class of the error."""
    said = []
    for create in (lambda: pools.create(name, config), lambda: HandleQueue.create(name, 4)):
        try:
            create().close()
        except (SharedMemoryFullError, PoolPermissionError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return "; ".join(said)


def needs_mounts() -> None:
    if reason := namespaces.why_no_mounts():
        pytest.skip(reason)


# ---- the shared memory folder ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (namespaces.take_shared_memory_away, "Full.*: /dev/shm does not exist: mount a tmpfs ther"),
        (namespaces.make_shared_memory_read_only, "Permission.*: /dev/shm is mounted read-only: "),
    ],
)
def test_a_folder_that_takes_no_segment_is_told(
    pool_name: str, change: Callable[[], None], said: str
) -> None:
    needs_mounts()

    def there() -> str:
        change()
        return refused(pool_name)

    answer = run_in_fork(there)
    assert re.search(f"{said}.*{said}", answer), answer


def test_a_pool_in_a_folder_that_became_read_only_is_told_to_who_attaches(pool_name: str) -> None:
    needs_mounts()

    def there() -> str:
        namespaces.make_shared_memory_read_only()
        with pytest.raises(PoolPermissionError) as caught:
            pools.attach(pool_name)
        return str(caught.value)

    with pools.create(pool_name):
        assert "/dev/shm is mounted read-only" in run_in_fork(there)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_this_user_may_not_write_to_is_told(pool_name: str) -> None:
    needs_mounts()

    def there() -> str:
        namespaces.shrink_shared_memory(64)
        os.chmod("/dev/shm", 0o755)
        os.setresuid(65534, 65534, 65534)
        return refused(pool_name)

    answer = run_in_fork(there)
    assert "PoolPermissionError: pool" in answer
    assert "user 65534 may not make files in /dev/shm: let root do `chmod 1777" in answer


# ---- limits of the process -------------------------------------------------------------------


def test_a_limit_on_the_size_of_files_is_told_and_not_a_signal(pool_name: str) -> None:
    """Found: the advice was --shm-size; and with SIGXFSZ as the kernel has it, the process died."""

    def there() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
        return refused(pool_name, of_size(4))

    answer = run_in_fork(there)
    assert re.search(r"needs [45](\.\d)? MiB, this process may make files of up to 1 MiB", answer)
    assert "ulimit -f unlimited" in answer
    assert "--shm-size" not in answer


def limit_address_space(mebibytes: int) -> None:
    """So much more than there is now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limit = now + mebibytes * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_a_limit_on_address_space_is_told_at_creation(pool_name: str) -> None:
    def there() -> str:
        limit_address_space(64)
        return refused(pool_name, of_size(100))

    answer = run_in_fork(there)
    assert re.search(r"needs 10\d MiB of address space, this process may map \d+.* more", answer)
    assert "ulimit -v unlimited" in answer
    assert not Path(path_of(pool_name)).exists()


def test_a_limit_on_address_space_is_told_to_who_attaches_and_the_pool_goes_on(
    pool_name: str,
) -> None:
    def there() -> str:
        limit_address_space(64)
        with pytest.raises(SharedMemoryFullError) as caught:
            pools.attach(pool_name)
        return str(caught.value)

    with pools.create(pool_name, of_size(100)) as pool:
        assert re.search(r"needs 10\d MiB of address space", run_in_fork(there))
        pool.free(pools.take(pool))
        assert pool.check() == []


def test_no_limit_on_address_space_refuses_nothing() -> None:
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert address_space_refusal(1 << 60) is None


# ---- the container ---------------------------------------------------------------------------

MOUNTS = "30 24 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """The root of a container of 4 GiB, 1 of them used and another one a cache."""
    for path, text in {
        "proc/self/mountinfo": MOUNTS,
        "proc/self/cgroup": "0::/\n",
        "proc/meminfo": "MemTotal: 99999999 kB\nSwapFree: 0 kB\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file {GIB // 2}\n",
    }.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_a_pool_that_the_container_cannot_hold_is_refused_with_the_right_advice(
    container: Path,
) -> None:
    assert tightest_memory_limit(container) is not None
    assert container_refusal(3 * GIB, container) is None
    refusal = container_refusal(3 * GIB + 1, container)
    assert refusal is not None
    assert "needs 3 GiB, the memory limit of 4 GiB (/sys/fs/cgroup) leaves 3 GiB" in refusal.found
    assert "--shm-size does not help" in refusal.advice


def test_free_swap_counts_as_memory_of_the_container(container: Path) -> None:
    (container / "proc/meminfo").write_text("SwapFree: 1048576 kB\n")
    assert container_refusal(4 * GIB, container) is None
    assert container_refusal(4 * GIB + 1, container) is not None


def test_a_machine_without_groups_refuses_nothing(tmp_path: Path) -> None:
    assert container_refusal(1 << 60, tmp_path) is None


def test_creation_asks_the_container_only_for_pools_that_are_worth_it(
    container: Path, tmp_path: Path
) -> None:
    (container / "sys/fs/cgroup/memory.max").write_text(f"{GIB}\n")  # less than is used
    shm = Path(SHM_DIRECTORY)
    assert refusal_of(MIB, shm, container) is None
    if os.statvfs(shm).f_bavail * os.statvfs(shm).f_frsize > 64 * MIB:
        refusal = refusal_of(64 * MIB, shm, container)
        assert refusal is not None
        assert "leaves 0 B" in refusal.found


def test_creating_a_pool_says_what_the_container_would_kill_for(
    pool_name: str, container: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (container / "sys/fs/cgroup/memory.max").write_text(f"{2 * GIB}\n")
    (container / "sys/fs/cgroup/memory.stat").write_text("")

    def asked(size: int, shm: Path) -> object:
        return refusal_of(size, shm, container)

    monkeypatch.setattr(segment_module, "refusal_of", asked)
    with pytest.raises(SharedMemoryFullError, match=r"beyond it the kernel kills: raise the cont"):
        pools.create(pool_name, of_size(70))
    assert not Path(path_of(pool_name)).exists()


# ---- signals ---------------------------------------------------------------------------------


def test_a_periodic_signal_does_not_keep_a_pool_from_being_made(pool_name: str) -> None:
    """Found: the kernel took the interrupted allocation back, for ever."""

    def there() -> int:
        ticks = []
        signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        with pools.create(pool_name, of_size(256)):
            signal.setitimer(signal.ITIMER_REAL, 0)
        return len(ticks)

    assert run_in_fork(there) > 0


# ---- threads ---------------------------------------------------------------------------------

AT_EXIT = """
import atexit, sys
from shmblocks import BlockPool, PoolConfig

name = sys.argv[1]
config = PoolConfig(total_tokens=64, block_size=4)

def use():
    with BlockPool.create(name, config), BlockPool.attach(name) as pool:
        print("used", pool.check())

atexit.register(use)
"""


def test_a_pool_is_made_and_attached_while_the_interpreter_ends(pool_name: str) -> None:
    """Found: "can't create new thread at interpreter shutdown", from Python 3.12 on."""
    ended = run_program([sys.executable, "-c", AT_EXIT, pool_name])
    assert (ended.stdout, ended.stderr) == ("used []\n", "")


# ---- the clock -------------------------------------------------------------------------------


def test_the_clock_of_this_process_is_the_machines() -> None:
    assert clock_offset_ns() == 0


def test_a_process_in_another_time_namespace_knows_how_far_its_clock_is_off() -> None:
    if reason := namespaces.why_no_time():
        pytest.skip(reason)
    here = time.monotonic_ns()

    def there() -> tuple[int, int, int]:
        namespaces.set_monotonic_offset(86400)
        return (clock_offset_ns(), *run_in_fork(lambda: (clock_offset_ns(), time.monotonic_ns())))

    parent, child, clock = run_in_fork(there)
    assert parent == 0
    assert child == 86400 * 10**9
    assert 86400 * 10**9 <= clock - here < 2 * 86400 * 10**9


def test_a_pool_is_used_at_once_after_its_creation_was_refused(pool_name: str) -> None:
    with pytest.raises(SharedMemoryFullError):
        pools.create(pool_name, PoolConfig(total_tokens=1 << 24, block_size=1, fields=wide()))
    with BlockPool.create(pool_name, pools.tiny()) as pool:
        assert pool.check() == []


def wide() -> tuple[Field, ...]:
    return (Field("x", (1 << 20,), "uint8"),)
