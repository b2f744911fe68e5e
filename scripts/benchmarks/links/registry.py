"""Every candidate there is. A new one is a line here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from benchmarks.link import Candidate, Context, Ends, Kind, Solo, SoloPlan
from benchmarks.links import alloc, floors, numpy_queue, pool, shared_memory, torch_queue
from benchmarks.links.channel import handle_queue, pipe
from benchmarks.settings import Settings

# Peers that no run measures, and why.
NOT_MEASURED = (
    "vLLM's shared-memory ring (vllm would replace torch by a CUDA build of many gigabytes)",
)


def _tokens(settings: Settings) -> tuple[int, ...]:
    return settings.tokens


@contextmanager
def _zmq(copy: bool, context: Context, settings: Settings) -> Iterator[Ends]:
    from benchmarks.links import zmq_ipc

    with zmq_ipc.connect(copy, context, settings) as ends:
        yield ends


@contextmanager
def _iceoryx(in_place: bool, context: Context, settings: Settings) -> Iterator[Ends]:
    from benchmarks.links import iceoryx

    with iceoryx.connect(in_place, context, settings) as ends:
        yield ends


def _ray(settings: Settings) -> Callable[[], Solo]:
    from benchmarks.links import ray_store

    return ray_store.prepare(settings)


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
    about="data written straight into the pool; the handle through a HandleQueue, both awake",
    how=partial(pool.connect, True, partial(handle_queue, True)),
)
ASLEEP = Candidate(
    name="shmblocks-asleep",
    label="shmblocks, in place, asleep",
    kind=Kind.OURS,
    about="the same to a consumer that is asleep: its HandleQueue never spins",
    how=partial(pool.connect, True, partial(handle_queue, False)),
)
IN_PLACE_PIPE = Candidate(
    name="shmblocks-in-place-pipe",
    label="shmblocks, in place, Pipe",
    kind=Kind.OURS,
    about="the same with the handle through a multiprocessing.Pipe",
    how=partial(pool.connect, True, pipe),
)
COPY = Candidate(
    name="shmblocks-copy",
    label="shmblocks, with copy",
    kind=Kind.OURS,
    about="data copied into the pool; the handle through a HandleQueue, both awake",
    how=partial(pool.connect, False, partial(handle_queue, True)),
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
ZMQ_COPY = Candidate(
    name="zmq-copy",
    label="pyzmq ipc, copy",
    kind=Kind.PEER,
    about="the payload through a PUSH/PULL pair over ipc://, copy=True",
    how=partial(_zmq, True),
    package="zmq",
)
ZMQ_NO_COPY = Candidate(
    name="zmq-no-copy",
    label="pyzmq ipc, no copy",
    kind=Kind.PEER,
    about="the payload through a PUSH/PULL pair over ipc://, copy=False",
    how=partial(_zmq, False),
    package="zmq",
)
ICEORYX = Candidate(
    name="iceoryx2-in-place",
    label="iceoryx2, in place",
    kind=Kind.PEER,
    about="data written into a loaned sample; an event wakes the subscriber",
    how=partial(_iceoryx, True),
    package="iceoryx2",
)
ICEORYX_COPY = Candidate(
    name="iceoryx2-copy",
    label="iceoryx2, with copy",
    kind=Kind.PEER,
    about="data copied into a loaned sample; an event wakes the subscriber",
    how=partial(_iceoryx, False),
    package="iceoryx2",
)
RAY = Candidate(
    name="ray",
    label="Ray object store",
    kind=Kind.PEER,
    about="ray.put of a numpy view by a driver, ray.get in an actor that is called with it",
    how=SoloPlan(_ray, _tokens, Settings.messages),
    package="ray",
    apart=True,
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
    ASLEEP,
    IN_PLACE_PIPE,
    COPY,
    ICEORYX,
    ICEORYX_COPY,
    SHARED_MEMORY,
    TORCH_FD,
    TORCH_FILES,
    NUMPY,
    ZMQ_COPY,
    ZMQ_NO_COPY,
    RAY,
    ALLOC,
)


def is_installed(candidate: Candidate) -> bool:
    """Whether the package that it needs is there."""
    package = candidate.package
    return package is None or importlib.util.find_spec(package) is not None


def left_out() -> list[str]:
    """Peers that a full run does not measure here, and why."""
    missing = [
        f"{candidate.label} ({candidate.package} is not installed)"
        for candidate in CANDIDATES
        if not is_installed(candidate)
    ]
    return [*missing, *NOT_MEASURED]


class UnknownCandidateError(ValueError):
    """A name that no candidate has."""


def choose(names: Sequence[str] | None) -> list[Candidate]:
    """The candidates of these names, in the order of the table; for None all that are installed."""
    if names is None:
        return [candidate for candidate in CANDIDATES if is_installed(candidate)]
    known = [candidate.name for candidate in CANDIDATES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownCandidateError(f"expected some of {', '.join(known)}; got {unknown[0]!r}")
    return [candidate for candidate in CANDIDATES if candidate.name in names]
