"""The CUDA allocation of a pool, as one process has it.

Contract
- The creator allocates; every other process opens the creator's allocation once, however many pool
  objects and views it has (an IPC handle cannot be opened where it was made, and each further
  opening would cost as much as the first).
- The memory stays until the last tensor on it is gone: tensors keep this object alive.
- The creator of a pool that others still use does not free it: what they have mapped would be
  pulled away under some drivers. It goes with the process then.

What it does not do: know the pool, or tell anybody who has it open.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from shmblocks.cuda.driver import Gpu
from shmblocks.errors import CudaUnavailableError, InvalidStateError

if TYPE_CHECKING:
    import torch


class DeviceMemory:
    """Device memory that this process allocated or opened; freed or closed with its last user."""

    def __init__(
        self, gpu: Gpu, device: int, home: int | None, address: int, size: int, is_own: bool
    ) -> None:
        self.gpu = gpu
        self.device = device
        self.home = home
        self.address = address
        self.size_bytes = size
        self.is_own = is_own
        release = gpu.free if is_own else gpu.close
        self._finalizer = weakref.finalize(
            self, _give_back, gpu, device, address, release, os.getpid()
        )
        # The end of the process gives it back as well, and by then CUDA may be gone.
        self._finalizer.atexit = False

    def keep_until_exit(self) -> None:
        """Others have it open: never free it."""
        _kept.append(self)


class DeviceFields:
    """Fields in device memory, which the first tensor opens (`view.FieldMemory`)."""

    def __init__(self, open_memory: Callable[[], DeviceMemory]) -> None:
        self._open = open_memory
        self._memory: DeviceMemory | None = None

    def maker(self, dtype: torch.dtype) -> Callable[[int, int], torch.Tensor]:
        """What gives `[count]` elements from byte `offset` on, with a storage of its own."""
        memory = self._memory
        if memory is None:
            memory = self._memory = self._open()

        def make(offset: int, count: int) -> torch.Tensor:
            gpu, address, size = memory.gpu, memory.address + offset, count * dtype.itemsize
            return gpu.bytes_at(memory.device, memory.home, address, size, memory).view(dtype)

        return make

    def memory(self, offset: int, size: int) -> memoryview:
        raise InvalidStateError(
            "memory: the fields of a CUDA pool are not in host memory; take tensors instead"
        )


_lock = threading.Lock()
_living: weakref.WeakValueDictionary[tuple[int, int], DeviceMemory] = weakref.WeakValueDictionary()
_kept: list[DeviceMemory] = []


def allocate(gpu: Gpu, device: int, size: int, pool_id: int) -> DeviceMemory:
    """The memory of a new pool."""
    memory = DeviceMemory(gpu, device, device, gpu.allocate(device, size), size, is_own=True)
    with _lock:
        _living[os.getpid(), pool_id] = memory
    return memory


def of_pool(pool_id: int) -> DeviceMemory | None:
    """What this process has of a pool already."""
    with _lock:
        return _living.get((os.getpid(), pool_id))


def open_exported(
    gpu: Gpu, device: int, uuid: bytes, handle: bytes, size: int, pool_id: int
) -> DeviceMemory:
    """The memory that another process exported, for `device`; opened once per process."""
    with _lock:
        memory = _living.get((os.getpid(), pool_id))
        if memory is None:
            home = gpu.find(uuid)
            if home is None:
                raise CudaUnavailableError(
                    f"the pool's memory lies on GPU {uuid.hex()}, which this process does not see "
                    "(CUDA_VISIBLE_DEVICES, or the container's devices)"
                )
            address = gpu.open(device, handle)
            memory = DeviceMemory(gpu, device, home, address, size, is_own=False)
            _living[os.getpid(), pool_id] = memory
        return memory


def _give_back(
    gpu: Gpu, device: int, address: int, release: Callable[[int, int], None], process: int
) -> None:
    if os.getpid() != process:
        return  # a forked child has the object, but not the memory
    try:
        gpu.synchronize(device)
        release(device, address)
    except CudaUnavailableError:
        return  # the driver is shutting down, or broken: it takes everything back itself
