"""Every transport there is. A new one is an entry in `TRANSPORTS`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import cast

from benchmarks.settings import Settings
from benchmarks.transport import Alone, Connect, Context, Ends, Kind, Solo, Transport
from benchmarks.transports import baselines, pool_channel, shmblocks_pool, standard
from benchmarks.transports.shmblocks_pool import handle_queue, pipe

# Peers that no run measures, and why.
NOT_MEASURED = (
    "vLLM's shared-memory ring (vllm would replace torch by a CUDA build of many gigabytes)",
)


def _optional(module: str, *arguments: object) -> Connect:
    """`connect` of a module whose package need not be there: imported when it is measured."""

    def connect(context: Context, settings: Settings) -> AbstractContextManager[Ends]:
        function = importlib.import_module(f"benchmarks.transports.{module}").connect
        return cast("Callable[..., AbstractContextManager[Ends]]", function)(
            *arguments, context, settings
        )

    return connect


def _ray(settings: Settings) -> Solo:
    from benchmarks.transports import ray_store

    return ray_store.RayHandoff(settings)


_queue, _queue_asleep = partial(handle_queue, True), partial(handle_queue, False)
_pool, _torch = shmblocks_pool.connect, standard.connect_torch_queue
_channel = pool_channel.connect

# fmt: off
TRANSPORTS: tuple[Transport, ...] = (
    Transport(
        "memcpy", "memcpy (baseline)", Kind.BASELINE, Alone(baselines.Memcpy),
        "one copy_ into faulted shared memory, in one process",
    ),
    Transport(
        "wake-pipe", "wake, pipe (baseline)", Kind.BASELINE, baselines.connect_pipe,
        "one byte through a pipe wakes a process, one way", carries_data=False,
    ),
    Transport(
        "wake-semaphore", "wake, semaphore (baseline)", Kind.BASELINE, baselines.connect_semaphore,
        "a POSIX semaphore (futex) wakes a process, one way", carries_data=False,
    ),
    Transport(
        "wake-spin", "spin and a tensor (baseline)", Kind.BASELINE,
        partial(baselines.connect_tensors, False),
        "one tensor over shared memory on each side, and a spin on a word: no lock, no allocator",
    ),
    Transport(
        "wake-sleep", "sleep and a tensor (baseline)", Kind.BASELINE,
        partial(baselines.connect_tensors, True),
        "the same to a consumer that is asleep until a semaphore (futex) wakes it",
    ),
    Transport(
        "shmblocks-channel", "shmblocks, channel", Kind.OURS, partial(_channel, True, True, True),
        "data written straight into the pool, announced by a channel; both awake",
    ),
    Transport(
        "shmblocks-channel-asleep", "shmblocks, channel, asleep", Kind.OURS,
        partial(_channel, True, False, True),
        "the same to a consumer that is asleep: its channel never spins",
    ),
    Transport(
        "shmblocks-channel-copy", "shmblocks, channel, with copy", Kind.OURS,
        partial(_channel, False, True, True),
        "data copied into the pool, announced by a channel; both awake",
    ),
    Transport(
        "shmblocks-channel-python", "shmblocks, channel, Python alone", Kind.OURS,
        partial(_channel, True, True, False),
        "as `shmblocks-channel`, without the compiled core",
    ),
    Transport(
        "shmblocks-in-place", "shmblocks, in place", Kind.OURS, partial(_pool, True, _queue),
        "data written straight into the pool; the handle through a HandleQueue, both awake",
    ),
    Transport(
        "shmblocks-asleep", "shmblocks, in place, asleep", Kind.OURS,
        partial(_pool, True, _queue_asleep),
        "the same to a consumer that is asleep: its HandleQueue never spins",
    ),
    Transport(
        "shmblocks-in-place-pipe", "shmblocks, in place, Pipe", Kind.OURS,
        partial(_pool, True, pipe),
        "the same with the handle through a multiprocessing.Pipe",
    ),
    Transport(
        "shmblocks-copy", "shmblocks, with copy", Kind.OURS, partial(_pool, False, _queue),
        "data copied into the pool; the handle through a HandleQueue, both awake",
    ),
    Transport(
        "iceoryx2-in-place", "iceoryx2, in place", Kind.PEER, _optional("iceoryx", True, False),
        "data written into a loaned sample; an event wakes the subscriber", package="iceoryx2",
    ),
    Transport(
        "iceoryx2-polling", "iceoryx2, in place, polling", Kind.PEER,
        _optional("iceoryx", True, True),
        "data written into a loaned sample; the subscriber polls for it", package="iceoryx2",
    ),
    Transport(
        "iceoryx2-copy", "iceoryx2, with copy", Kind.PEER, _optional("iceoryx", False, False),
        "data copied into a loaned sample; an event wakes the subscriber", package="iceoryx2",
    ),
    Transport(
        "shared-memory", "SharedMemory per message", Kind.PEER,
        partial(standard.connect_shared_memory, pipe),
        "a multiprocessing.shared_memory object per message; its name through a Pipe",
    ),
    Transport(
        "torch-queue-fd", "torch Queue, file_descriptor", Kind.PEER,
        partial(_torch, "file_descriptor"),
        "torch.multiprocessing.Queue, sharing strategy file_descriptor",
    ),
    Transport(
        "torch-queue-fs", "torch Queue, file_system", Kind.PEER, partial(_torch, "file_system"),
        "torch.multiprocessing.Queue, sharing strategy file_system",
    ),
    Transport(
        "numpy-queue", "numpy pickled, mp.Queue", Kind.PEER, standard.connect_numpy_queue,
        "a numpy array pickled through multiprocessing.Queue", package="numpy",
    ),
    Transport(
        "zmq-copy", "pyzmq ipc, copy", Kind.PEER, _optional("zmq_ipc", True),
        "the payload through a PUSH/PULL pair over ipc://, copy=True", package="zmq",
    ),
    Transport(
        "zmq-no-copy", "pyzmq ipc, no copy", Kind.PEER, _optional("zmq_ipc", False),
        "the payload through a PUSH/PULL pair over ipc://, copy=False", package="zmq",
    ),
    Transport(
        "ray", "Ray object store", Kind.PEER, Alone(_ray),
        "ray.put of a numpy view by a driver, ray.get in an actor that is called with it",
        apart=True, package="ray",
    ),
)
# fmt: on


def is_installed(transport: Transport) -> bool:
    """Whether the package that it needs is there."""
    package = transport.package
    return package is None or importlib.util.find_spec(package) is not None


def left_out() -> list[str]:
    """Peers that a full run does not measure here, and why."""
    missing = [
        f"{transport.label} ({transport.package} is not installed)"
        for transport in TRANSPORTS
        if not is_installed(transport)
    ]
    return [*missing, *NOT_MEASURED]


class UnknownTransportError(ValueError):
    """A name that no transport has."""


def choose(names: Sequence[str] | None) -> list[Transport]:
    """The transports of these names, in the order of the table; None: all that are installed."""
    if names is None:
        return [transport for transport in TRANSPORTS if is_installed(transport)]
    known = [transport.name for transport in TRANSPORTS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownTransportError(f"expected some of {', '.join(known)}; got {unknown[0]!r}")
    return [transport for transport in TRANSPORTS if transport.name in names]
