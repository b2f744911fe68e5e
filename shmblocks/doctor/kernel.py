"""The kernel: the features that pools need, each tried in the real folder, and its limits.

Tried and not concluded from a version number: sandboxes, seccomp filters and old kernels differ in
what they refuse. No probe goes through a pool: when one of these fails, a pool could only say that
it failed, not which piece is missing.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import resource
import tempfile
from collections.abc import Callable, Iterator

from shmblocks._os.cgroup import cpu_quota
from shmblocks._os.filelock import FileLocks
from shmblocks._os.futex import Futex
from shmblocks._os.prefault import MADV_POPULATE_WRITE
from shmblocks._os.process import MACHINES, Interpreter, is_supported
from shmblocks._words import bytes_text, count_text
from shmblocks.doctor.host import CheckResult, Host, Status

OLD_KERNEL = "use a newer kernel, or another sandbox: this one refuses it"

# A pool takes a few descriptors, a serving engine hundreds for its sockets.
# Smaller: engines run out unwarned. Larger: machines that serve well are warned.
COMFORTABLE_DESCRIPTORS = 1024


# ---- what every probe is ---------------------------------------------------------------------


class NotSeenError(Exception):
    """A probe's calls succeeded, and did not do what they should; the text says what was seen."""


def _tried(
    name: str,
    call: str,
    probe: Callable[[], str],
    advice: str,
    otherwise: Status = "fail",
) -> CheckResult:
    """What `probe` found; `otherwise`, with the error and the advice, when it fails.

    `call` is the call that the kernel may refuse.
    """
    try:
        return CheckResult(name, "ok", probe())
    except NotSeenError as error:
        return CheckResult(name, otherwise, str(error), advice)
    except OSError as error:
        return CheckResult(name, otherwise, f"{call}: {error.strerror}", advice)


@contextlib.contextmanager
def _shared_page(host: Host) -> Iterator[mmap.mmap]:
    """One page of shared memory, mapped."""
    with tempfile.TemporaryFile(dir=host.shm) as file:
        os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as page:
            yield page


# ---- features --------------------------------------------------------------------------------


def platform_supported(host: Host) -> Iterator[CheckResult]:
    """Importing the library refuses other machines; here it is said as a finding."""
    interpreter = Interpreter.running()
    if is_supported(interpreter):
        yield CheckResult("platform", "ok", f"{interpreter}, kernel {platform.release()}")
    else:
        advice = f"use 64-bit Linux on {' or '.join(MACHINES)}"
        yield CheckResult("platform", "fail", str(interpreter), advice)


def proc_mounted(host: Host) -> Iterator[CheckResult]:
    """Descriptors are opened again, and files given a name, through /proc/self/fd."""

    def probe() -> str:
        with open(os.devnull, "rb") as file:
            if not host.path(f"/proc/self/fd/{file.fileno()}").exists():
                raise NotSeenError("/proc is not mounted, or hides this process's descriptors")
        return "/proc shows this process's descriptors"

    yield _tried("proc", "/proc/self/fd", probe, "mount -t proc proc /proc")


def ofd_locks(host: Host) -> Iterator[CheckResult]:
    """Two open file descriptions of one file: the second must see the first one's locks."""

    def probe() -> str:
        with tempfile.TemporaryFile(dir=host.shm) as file:
            fd = file.fileno()
            with (
                contextlib.closing(FileLocks(fd)) as holder,
                contextlib.closing(FileLocks(fd)) as other,
            ):
                is_byte_seen = holder.try_lock(1) and other.is_locked_by_others(1)
                is_seen = is_byte_seen and holder.try_enter() and not other.try_enter()
        if not is_seen:
            raise NotSeenError(f"another description does not see a lock in {host.shm}")
        return f"another open file description sees a lock in {host.shm}"

    yield _tried("ofd-locks", "F_OFD_SETLK, flock", probe, OLD_KERNEL)


def unnamed_files(host: Host) -> Iterator[CheckResult]:
    """A pool is built without a name and gets it when it is whole: O_TMPFILE, then linkat.

    Where the file system has no O_TMPFILE, under a hidden name that is then linked.
    """
    folder = str(host.shm)
    name = f"{folder}/shmblocks-doctor-{os.getpid()}-{os.urandom(4).hex()}"

    def unnamed() -> str:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            # `src_dir_fd` makes Python call linkat, which follows the /proc link.
            os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
            os.unlink(name)
        finally:
            os.close(fd)
        return f"a file without a name in {folder} can be given one in one step"

    def hidden() -> str:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.link(file.name, name)
            os.unlink(name)
        return f"{folder} has no O_TMPFILE: pools are made under a hidden name, which is as safe"

    first = _tried("unnamed-files", f"O_TMPFILE and linkat in {folder}", unnamed, "")
    if first.status == "ok":
        yield first
        return
    advice = f"mount a tmpfs on {folder}, and see that /proc is mounted"
    second = _tried("unnamed-files", f"{first.found}; link", hidden, advice)
    yield second


def populate_write(host: Host) -> Iterator[CheckResult]:
    """Maps the pages of a pool at once; without it the first copies are slow."""

    def probe() -> str:
        with _shared_page(host) as page:
            page.madvise(MADV_POPULATE_WRITE)
        return "MADV_POPULATE_WRITE maps pages ahead"

    call = "the first use of each page is slower: MADV_POPULATE_WRITE"
    yield _tried("populate-write", call, probe, "use Linux 5.14 or newer", "warn")


def futex(host: Host) -> Iterator[CheckResult]:
    """Waking between processes: allowed on shared memory, though nobody sleeps there now."""

    def probe() -> str:
        with _shared_page(host) as page:
            word = Futex(page, 0)
            try:
                word.wake()
            finally:
                word.drop()  # or the mapping could not be closed
        return "sleepers on a word of shared memory can be woken"

    yield _tried("futex", "FUTEX_WAKE", probe, OLD_KERNEL)


# ---- limits of this process ------------------------------------------------------------------


def open_files(host: Host) -> Iterator[CheckResult]:
    """Descriptors per process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = (
        f"up to {_limit_text(soft)} open files per process (can be raised to {_limit_text(hard)})"
    )
    if _reaches(soft, COMFORTABLE_DESCRIPTORS):
        yield CheckResult("open-files", "ok", found)
    else:
        yield CheckResult("open-files", "warn", found, f"ulimit -n {COMFORTABLE_DESCRIPTORS}")


def locked_memory(host: Host) -> Iterator[CheckResult]:
    """What may be locked: RDMA engines that register a pool are bound by it.

    CUDA is not (measured: an H100 with driver 580, an ordinary user with a limit of 64 KiB,
    `cudaHostRegister` of 2 MiB of shared memory succeeded), so a GPU is no reason to warn.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield CheckResult("locked-memory", "ok", "memory may be locked without limit")
        return
    found = f"up to {bytes_text(soft)} of memory may be locked per process"
    if os.geteuid() == 0:
        found = f"{found} (root may usually lock more)"
    if _has_rdma(host):
        advice = "ulimit -l unlimited (container: --ulimit memlock=-1)"
        found = f"{found}; registering a pool with the RDMA device here needs the pool's size"
        yield CheckResult("locked-memory", "warn", found, advice)
    else:
        yield CheckResult("locked-memory", "ok", f"{found}; no RDMA device here needs more")


def processors(host: Host) -> Iterator[CheckResult]:
    """Two processes that share one processor must sleep to let the other run."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota(host.root)
    found = count_text(allowed, "processor")
    usable = float(allowed)
    if quota is not None and quota < allowed:
        found, usable = f"{found}, limited to the time of {quota:g}", quota
    if usable >= 2:
        yield CheckResult("processors", "ok", found)
    else:
        found = f"{found}: producer and consumer take turns"
        yield CheckResult("processors", "warn", found, "give the processes two processors or more")


def _has_rdma(host: Host) -> bool:
    folder = host.path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def _reaches(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def _limit_text(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)
