"""Peer: Ray's object store. A driver puts a numpy view and calls an actor with the reference.

    driver:  ray.put, actor.receive.remote -------->  actor: ray.get, read one value: stamp
                                                      check every byte, not timed
             stamp                         <--------  return the stamp

The actor is one of Ray's own workers, which is how Ray wants to be used; hence the driver measures
by itself. Ray's daemons are more neighbours than any other transport has, so it is measured after
the others and not among them. numpy knows no bf16: the same bytes travel as int16, a view on both
sides.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from benchmarks.payload import Pattern
from benchmarks.pingpong import SETTLE_NS, now, spin, touch
from benchmarks.report import Sample
from benchmarks.settings import REHEARSAL_TOKENS, Settings
from benchmarks.transport import OwnBuffers

STORE_BYTES = 2 << 30


class Taker:
    """The actor."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        # The consumer only reads what lies in the store.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._pattern = Pattern(settings.hidden, settings.seed)

    def receive(self, boxed: list[ray.ObjectRef[npt.NDArray[np.int16]]], number: int) -> int:
        """In a list, a reference stays one: the actor gets the object itself."""
        tensor = torch.from_numpy(ray.get(boxed[0])).view(torch.bfloat16)
        touch(tensor)
        held = now()
        self._pattern.check(tensor, number, len(tensor))
        return held


class RayHandoff:
    """The driver, and its cluster of one node."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pattern = Pattern(settings.hidden, settings.seed)
        self._own = OwnBuffers(settings.hidden)
        self._number = 0
        self._folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=self._folder,
        )
        self._taker: Any = ray.remote(Taker).remote(settings)
        self._message(REHEARSAL_TOKENS)

    def measure(self, size: int, count: int) -> list[Sample]:
        return [self._rehearsed(size) for _ in range(count)]

    def close(self) -> None:
        ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _rehearsed(self, tokens: int) -> Sample:
        for _ in range(2 * self._settings.rehearsals):
            self._message(REHEARSAL_TOKENS)
        return self._message(tokens)

    def _message(self, tokens: int) -> Sample:
        self._number += 1
        payload = self._own.get(tokens)
        self._pattern.fill(payload, self._number)
        spin(SETTLE_NS)
        start = now()
        reference = ray.put(payload.view(torch.int16).numpy())
        held: int = ray.get(self._taker.receive.remote([reference], self._number))
        return Sample(held - start)
