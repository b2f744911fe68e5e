"""The doctor's checks, on machines made of text files, and once on this one."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from shmblocks._os import cgroup, limits
from shmblocks.doctor import Check, CheckResult, Host, kernel, logind, memory
from shmblocks.doctor.child import run_module
from shmblocks.doctor.host import ask_program

GIB = 1 << 30

TMPFS = "25 24 0:23 / {shm} rw,relatime shared:3 - tmpfs tmpfs rw,size=1024k\n"
CGROUP2 = "30 24 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
CGROUP1 = "31 24 0:27 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
CGROUP1_CPU = "32 24 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"


def nobody_answers(command: Sequence[str]) -> str | None:
    return None


class Machine:
    """A root folder that is filled with the files a test needs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.shm = folder / "shm"
        self.root.mkdir()
        self.shm.mkdir()

    def host(self, answer: str | None = None, pool_bytes: int = 0) -> Host:
        def ask(command: Sequence[str]) -> str | None:
            return answer

        return Host(self.root, self.shm, ask, pool_bytes)

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def run(self, check: Check, answer: str | None = None, pool_bytes: int = 0) -> CheckResult:
        (result,) = check(self.host(answer, pool_bytes))
        return result


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# ---- shared memory ---------------------------------------------------------------------------


def test_a_tmpfs_is_recognised(machine: Machine) -> None:
    machine.write("/proc/self/mountinfo", TMPFS.format(shm=machine.shm))
    assert machine.run(memory.shm_mount).status == "ok"


def test_shared_memory_on_a_disk_is_a_warning(machine: Machine) -> None:
    disk = "24 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    machine.write("/proc/self/mountinfo", disk)
    result = machine.run(memory.shm_mount)
    assert result.status == "warn"
    assert "ext4" in result.found
    assert "tmpfs" in result.advice


def test_of_two_mounts_on_one_point_the_last_counts(machine: Machine) -> None:
    point = str(machine.shm)
    disk = f"24 1 8:1 / {point} rw - ext4 /dev/sda1 rw\n"
    machine.write("/proc/self/mountinfo", TMPFS.format(shm=point) + disk)
    assert machine.run(memory.shm_mount).status == "warn"
    machine.write("/proc/self/mountinfo", disk + TMPFS.format(shm=point))
    assert machine.run(memory.shm_mount).status == "ok"


def test_a_machine_without_the_folder_fails(machine: Machine) -> None:
    machine.shm.rmdir()
    for check in (memory.shm_mount, memory.shm_size, memory.shm_reserve, kernel.unnamed_files):
        result = machine.run(check)
        assert result.status == "fail", result
        assert result.advice


def fake_statvfs(free: int, total: int, inodes: int = 1000) -> os.statvfs_result:
    return os.statvfs_result(
        (4096, 4096, total >> 12, free >> 12, free >> 12, inodes, inodes, inodes, 0, 255)
    )


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [
        (4 * GIB, 8 * GIB, "ok"),
        (GIB >> 4, GIB >> 4, "warn"),  # 64 MiB: what a container has unless told otherwise
        (4096, 8 * GIB, "fail"),
    ],
)
def test_little_room_is_a_warning_and_none_a_failure(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, free: int, total: int, status: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: fake_statvfs(free, total))
    result = machine.run(memory.shm_size)
    assert result.status == status
    assert ("--shm-size" in result.advice) == (status != "ok")


# ---- control groups --------------------------------------------------------------------------


def v2_group(machine: Machine, group: str, limit: str, used: int, droppable: int = 0) -> None:
    folder = f"/sys/fs/cgroup{group}"
    machine.write(f"{folder}/memory.max", f"{limit}\n")
    machine.write(f"{folder}/memory.current", f"{used}\n")
    machine.write(f"{folder}/memory.stat", f"anon 1\ninactive_file {droppable}\nfile 5\n")


def test_the_tightest_group_above_a_process_counts(machine: Machine) -> None:
    machine.write("/proc/self/mountinfo", CGROUP2)
    machine.write("/proc/self/cgroup", "0::/pods/pod/worker\n")
    v2_group(machine, "/pods/pod/worker", "max", GIB)
    v2_group(machine, "/pods/pod", str(4 * GIB), 3 * GIB, droppable=GIB)
    v2_group(machine, "/pods", str(64 * GIB), 8 * GIB)
    limit = cgroup.tightest_memory_limit(machine.root)
    assert limit == cgroup.MemoryLimit("/sys/fs/cgroup/pods/pod", 4 * GIB, 2 * GIB)
    assert limit.left_bytes == 2 * GIB


def test_a_container_sees_its_own_group_as_the_root(machine: Machine) -> None:
    machine.write("/proc/self/mountinfo", CGROUP2)
    machine.write("/proc/self/cgroup", "0::/\n")
    v2_group(machine, "", str(GIB), GIB // 2)
    limit = cgroup.tightest_memory_limit(machine.root)
    assert limit == cgroup.MemoryLimit("/sys/fs/cgroup", GIB, GIB // 2)


def test_version_1_groups_below_a_mounted_part_are_found(machine: Machine) -> None:
    machine.write("/proc/self/mountinfo", CGROUP1.format(root="/docker/abc"))
    machine.write("/proc/self/cgroup", "7:cpu:/x\n4:memory:/docker/abc/inner\n0::/\n")
    folder = "/sys/fs/cgroup/memory/inner"
    machine.write(f"{folder}/memory.limit_in_bytes", f"{2 * GIB}\n")
    machine.write(f"{folder}/memory.usage_in_bytes", f"{GIB}\n")
    machine.write(f"{folder}/memory.stat", f"total_inactive_file {GIB // 4}\n")
    limit = cgroup.tightest_memory_limit(machine.root)
    assert limit == cgroup.MemoryLimit(folder, 2 * GIB, 3 * GIB // 4)


def test_version_1_without_a_limit_has_a_huge_number_that_is_none(machine: Machine) -> None:
    machine.write("/proc/self/mountinfo", CGROUP1.format(root="/"))
    machine.write("/proc/self/cgroup", "4:memory:/\n")
    machine.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    machine.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "4096\n")
    assert cgroup.tightest_memory_limit(machine.root) is None
    assert machine.run(memory.memory_limit).status == "ok"


def test_a_limit_below_what_shared_memory_offers_is_a_warning(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write("/proc/self/mountinfo", CGROUP2)
    machine.write("/proc/self/cgroup", "0::/\n")
    v2_group(machine, "", str(4 * GIB), GIB)
    monkeypatch.setattr(os, "statvfs", lambda _: fake_statvfs(8 * GIB, 8 * GIB))
    result = machine.run(memory.memory_limit)
    assert result.status == "warn"
    assert "3 GiB of it unused" in result.found
    monkeypatch.setattr(os, "statvfs", lambda _: fake_statvfs(2 * GIB, 2 * GIB))
    assert machine.run(memory.memory_limit).status == "ok"


def test_a_planned_pool_is_held_against_every_limit_in_the_words_of_create(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.run(memory.pool_size).status == "skip"
    monkeypatch.setattr(os, "statvfs", lambda _: fake_statvfs(8 * GIB, 8 * GIB))
    assert machine.run(memory.pool_size, pool_bytes=8 * GIB).status == "ok"
    for size in (8 * GIB + 1, 9 * GIB):
        result = machine.run(memory.pool_size, pool_bytes=size)
        refusal = limits.refusal_of(size, machine.shm, machine.root)
        assert refusal is not None
        assert (result.status, result.found) == ("fail", refusal.found)
        assert "--shm-size=" in result.advice
    machine.write("/proc/self/mountinfo", CGROUP2)
    machine.write("/proc/self/cgroup", "0::/\n")
    v2_group(machine, "", str(4 * GIB), GIB)
    assert machine.run(memory.pool_size, pool_bytes=3 * GIB).status == "ok"
    result = machine.run(memory.pool_size, pool_bytes=4 * GIB)
    assert "needs 4 GiB, the memory limit of 4 GiB" in result.found
    assert "--shm-size does not help" in result.advice


def test_a_file_system_without_unnamed_files_is_no_failure(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def refuse(path: str, flags: int, *rest: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return open_file(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    result = machine.run(kernel.unnamed_files)
    assert result.status == "ok"
    assert "hidden name" in result.found
    assert os.listdir(machine.shm) == []


def test_memory_that_is_not_there_is_a_warning(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write("/proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 1048576 kB\n")
    monkeypatch.setattr(os, "statvfs", lambda _: fake_statvfs(2 * GIB, 2 * GIB))
    result = machine.run(memory.memory_available)
    assert result.status == "warn"
    assert "1 GiB of memory" in result.found


@pytest.mark.parametrize(
    ("mount", "group", "files", "quota"),
    [
        (CGROUP2, "0::/\n", {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (CGROUP2, "0::/\n", {"/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            CGROUP1_CPU,
            "4:cpu,cpuacct:/\n",
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            CGROUP1_CPU,
            "4:cpu,cpuacct:/\n",
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_processor_quotas_are_read_in_both_versions(
    machine: Machine, mount: str, group: str, files: dict[str, str], quota: float | None
) -> None:
    machine.write("/proc/self/mountinfo", mount)
    machine.write("/proc/self/cgroup", group)
    for path, text in files.items():
        machine.write(path, text)
    assert cgroup.cpu_quota(machine.root) == quota
    result = machine.run(kernel.processors)
    if quota is not None:
        assert result.status == "warn"
        assert f"{quota:g}" in result.found


# ---- RemoveIPC -------------------------------------------------------------------------------


@pytest.fixture
def ordinary_user(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with systemd, where this process belongs to an ordinary user."""
    (machine.root / "run/systemd/system").mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    return machine


def test_without_systemd_nobody_removes_segments(machine: Machine) -> None:
    assert machine.run(logind.remove_ipc).status == "ok"


def test_system_users_are_spared(ordinary_user: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 400)
    assert ordinary_user.run(logind.remove_ipc, "b true\n").status == "ok"
    ordinary_user.write("/etc/login.defs", "# comment\nSYS_UID_MAX\t\t 399\n")
    assert ordinary_user.run(logind.remove_ipc, "b true\n").status == "warn"


@pytest.mark.parametrize(("answer", "status"), [("b true\n", "warn"), ("b false\n", "ok")])
def test_logind_itself_is_asked_first(ordinary_user: Machine, answer: str, status: str) -> None:
    ordinary_user.write("/etc/systemd/logind.conf", "[Login]\nRemoveIPC=maybe\n")
    result = ordinary_user.run(logind.remove_ipc, answer)
    assert result.status == status
    assert "logind itself" in result.found


def test_removal_is_the_default_where_nothing_is_set(ordinary_user: Machine) -> None:
    ordinary_user.write("/etc/systemd/logind.conf", "[Login]\n#RemoveIPC=no\n")
    result = ordinary_user.run(logind.remove_ipc)
    assert result.status == "warn"
    assert "RemoveIPC=no" in result.advice


def test_drop_ins_overrule_the_main_file_in_order_of_their_names(ordinary_user: Machine) -> None:
    ordinary_user.write("/etc/systemd/logind.conf", "[Login]\nRemoveIPC=yes\n")
    ordinary_user.write("/usr/lib/systemd/logind.conf.d/50-a.conf", "[Login]\nRemoveIPC=yes\n")
    ordinary_user.write("/etc/systemd/logind.conf.d/50-a.conf", "[Login]\nRemoveIPC = no\n")
    ordinary_user.write("/usr/lib/systemd/logind.conf.d/40-b.conf", "[Login]\nRemoveIPC=yes\n")
    result = ordinary_user.run(logind.remove_ipc)
    assert result.status == "ok"
    assert "/etc/systemd/logind.conf.d/50-a.conf" in result.found


# ---- this process ----------------------------------------------------------------------------


def test_few_descriptors_are_a_warning(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    result = machine.run(kernel.open_files)
    assert result.status == "warn"
    assert "any number" in result.found


def test_locked_memory_matters_where_an_rdma_device_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 16, 1 << 16))
    assert machine.run(kernel.locked_memory).status == "ok"
    machine.write("/sys/class/infiniband/mlx5_0/node_type", "1: CA\n")
    result = machine.run(kernel.locked_memory)
    assert result.status == "warn"
    assert "64 KiB" in result.found


def test_a_kernel_that_refuses_is_reported_with_what_it_said(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(kernel, "FileLocks", refuse)
    monkeypatch.setattr(os, "link", refuse)
    for check in (kernel.ofd_locks, kernel.unnamed_files):
        result = machine.run(check)
        assert result.status == "fail"
        assert "Invalid argument" in result.found


def test_a_machine_without_proc_is_told(machine: Machine) -> None:
    assert machine.run(kernel.proc_mounted).status == "fail"


def test_a_probe_that_dies_is_a_finding_and_not_a_crash() -> None:
    (result,) = run_module("trial", "shmblocks.doctor.no_such_module", [], 30.0)
    assert result.name == "trial"
    assert result.status == "fail"
    assert "no_such_module" in result.found


def test_a_probe_that_hangs_is_ended() -> None:
    (result,) = run_module("trial", "timeit", ["-n", "1", "import time; time.sleep(60)"], 0.5)
    assert "did not end within 0.5 s" in result.found


def test_a_program_that_is_missing_or_fails_gives_no_answer() -> None:
    assert ask_program(["shmblocks-no-such-program"]) is None
    assert ask_program(["false"]) is None
    assert ask_program(["echo", "yes"]) == "yes\n"
