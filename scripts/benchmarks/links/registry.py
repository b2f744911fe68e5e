"""Every candidate there is. A new one is a line here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.link import Candidate, Kind, SoloPlan
from benchmarks.links import alloc, floors, numpy_queue, pool, shared_memory, torch_queue
from benchmarks.links.channel import pipe
from benchmarks.settings import Settings


def _tokens(settings: Settings) -> tuple[int, ...]:
    return settings.tokens


MEMCPY = Candidate(
    name="memcpy",
    label="memcpy (floor)",
    kind=Kind.FLOOR,
    about="one copy_ into faulted shared memory, in one process",
    how=SoloPlan(floors.prepare_memcpy, _tokens, Settings.messages),
)
WAKE_PIPE = Candidate(
    name="wake-pipe",
    label="wake, pipe (floor)",
    kind=Kind.FLOOR,
    about="one byte through a pipe wakes a process, one way",
    how=floors.connect_pipe,
    carries_data=False,
)
WAKE_SEMAPHORE = Candidate(
    name="wake-semaphore",
    label="wake, semaphore (floor)",
    kind=Kind.FLOOR,
    about="a POSIX semaphore (futex) wakes a process, one way",
    how=floors.connect_semaphore,
    carries_data=False,
)
IN_PLACE = Candidate(
    name="shmblocks-in-place",
    label="shmblocks, in place",
    kind=Kind.OURS,
    about="data written straight into the pool; the handle through a multiprocessing.Pipe",
    how=partial(pool.connect, True, pipe),
)
COPY = Candidate(
    name="shmblocks-copy",
    label="shmblocks, with copy",
    kind=Kind.OURS,
    about="data copied into the pool; the handle through a multiprocessing.Pipe",
    how=partial(pool.connect, False, pipe),
)
TORCH_FD = Candidate(
    name="torch-queue-fd",
    label="torch Queue, file_descriptor",
    kind=Kind.PEER,
    about="torch.multiprocessing.Queue, sharing strategy file_descriptor",
    how=partial(torch_queue.connect, "file_descriptor"),
)
TORCH_FILES = Candidate(
    name="torch-queue-fs",
    label="torch Queue, file_system",
    kind=Kind.PEER,
    about="torch.multiprocessing.Queue, sharing strategy file_system",
    how=partial(torch_queue.connect, "file_system"),
)
NUMPY = Candidate(
    name="numpy-queue",
    label="numpy pickled, mp.Queue",
    kind=Kind.PEER,
    about="a numpy array pickled through multiprocessing.Queue",
    how=numpy_queue.connect,
)
SHARED_MEMORY = Candidate(
    name="shared-memory",
    label="SharedMemory per message",
    kind=Kind.PEER,
    about="a multiprocessing.shared_memory object per message; its name through a Pipe",
    how=partial(shared_memory.connect, pipe),
)
ALLOC = Candidate(
    name="alloc-free",
    label="shmblocks, alloc + free",
    kind=Kind.OURS,
    about=f"alloc of {alloc.PAIR_BLOCKS} blocks and free of them, in one process",
    how=SoloPlan(alloc.prepare, alloc.sizes, alloc.count, size_unit="blocks"),
)

CANDIDATES: tuple[Candidate, ...] = (
    MEMCPY,
    WAKE_PIPE,
    WAKE_SEMAPHORE,
    IN_PLACE,
    COPY,
    SHARED_MEMORY,
    TORCH_FD,
    TORCH_FILES,
    NUMPY,
    ALLOC,
)


class UnknownCandidateError(ValueError):
    """A name that no candidate has."""


def choose(names: Sequence[str] | None) -> list[Candidate]:
    """The candidates of these names, in the order of the table; all of them for None."""
    if names is None:
        return list(CANDIDATES)
    known = [candidate.name for candidate in CANDIDATES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownCandidateError(f"expected some of {', '.join(known)}; got {unknown[0]!r}")
    return [candidate for candidate in CANDIDATES if candidate.name in names]
