"""The calls of the CUDA driver that pools stand on, checked; the one place that knows its bindings.

Contract
- Every call that fails raises `CudaUnavailableError`, with the driver's name of what went wrong.
- `write` and `wait` only enqueue: they return at once and wait for nothing.
- A context is made on the device that is asked for, and on no other.

`cuda.bindings` comes with every CUDA build of torch from 2.10 on; the current device and stream are
torch's. `Gpu` says what the rest of this package needs, so that its logic runs in tests on machines
without a GPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from shmblocks.errors import CudaUnavailableError

if TYPE_CHECKING:
    import torch

_REGISTER_PORTABLE_MAPPED = 1 | 2
_IPC_LAZY_PEER_ACCESS = 1
# The default barrier: what the stream did before is visible before the word is.
_WRITE_DEFAULT = 0
# Satisfied when the word, as a signed difference, has reached the value: cyclic, so that a word
# must never be 2**63 or more away from what is waited for.
_WAIT_GEQ = 0
_INVALID_CONTEXT = 201
_NOT_CAPTURING = 0
# Default, legacy and per-thread stream: they mean a stream of the context that is current.
_LAST_OF_THE_CONTEXT = 2


class Gpu(Protocol):
    """What this package needs of a GPU's driver. Sizes in bytes; devices are torch's ordinals."""

    def current_device(self) -> int:
        """The calling thread's current device."""
        ...

    def current_stream(self, device: int) -> int:
        """Torch's current stream on a device."""
        ...

    def uuid(self, device: int) -> bytes:
        """What names the device on every process and machine: 16 bytes."""
        ...

    def find(self, uuid: bytes) -> int | None:
        """The device of that UUID; None when this process does not see it."""
        ...

    def allocate(self, device: int, size: int) -> int:
        """Plain device memory; its address."""
        ...

    def free(self, device: int, address: int) -> None:
        """Give back what `allocate` gave."""
        ...

    def export(self, device: int, address: int) -> bytes:
        """64 bytes by which another process of the node opens the memory."""
        ...

    def open(self, device: int, handle: bytes) -> int:
        """Map another process's memory for a device; its address."""
        ...

    def close(self, device: int, address: int) -> None:
        """Unmap what `open` mapped."""
        ...

    def register(self, device: int, address: int, size: int) -> int:
        """Let every device reach host memory; its address for a device."""
        ...

    def unregister(self, device: int, address: int) -> None:
        """Take back `register`; nothing may use it any more."""
        ...

    def write(self, device: int, stream: int, address: int, value: int) -> None:
        """Enqueue: the 64-bit word at the address becomes `value`."""
        ...

    def wait(self, device: int, stream: int, address: int, value: int) -> None:
        """Enqueue: go on when the 64-bit word at the address has reached `value`."""
        ...

    def may_be_captured(self, stream: int) -> bool:
        """Whether `is_capturing` can ever be True for a stream: not for a default stream."""
        ...

    def is_capturing(self, device: int, stream: int) -> bool:
        """Whether what is enqueued there goes into a graph instead of running."""
        ...

    def synchronize(self, device: int) -> None:
        """Wait for everything that was enqueued on the device by this process."""
        ...

    def bytes_at(
        self, device: int, home: int | None, address: int, size: int, owner: object
    ) -> torch.Tensor:
        """Device memory as uint8 on `device`, no copy; the tensor keeps `owner` alive.

        `home` is the device that the memory lies on, if this process sees it.
        """
        ...


@functools.cache
def load() -> Gpu:
    """The driver of this process; `CudaUnavailableError` says what is missing."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise CudaUnavailableError(
            f"torch {torch.__version__} finds no GPU in this process: run it where the GPU is "
            "(`shmblocks doctor` looks further); handles can be passed on without one"
        )
    try:
        torch.cuda.init()
        bindings = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise CudaUnavailableError(
            f"cuda.bindings cannot be imported ({error}): pip install cuda-bindings, of the CUDA "
            f"version of torch ({torch.version.cuda})"
        ) from error
    except RuntimeError as error:
        raise CudaUnavailableError(f"CUDA cannot be used in this process: {error}") from error
    return CudaDriver(bindings, torch)


class CudaDriver:
    """`Gpu` over `cuda.bindings`.

    `Any`, since neither that package nor a CUDA build of torch is there where types are checked.
    """

    def __init__(self, bindings: ModuleType, torch: ModuleType) -> None:
        self._cuda: Any = bindings
        self._torch: Any = torch
        self._contexts: dict[int, Any] = {}
        # Device -> its context as a number, which each write and wait compares with the thread's.
        self._addresses: dict[int, int] = {}
        self._write = bindings.cuStreamWriteValue64
        self._wait = bindings.cuStreamWaitValue64
        self._is_capturing = bindings.cuStreamIsCapturing
        self._get_current = bindings.cuCtxGetCurrent
        # The public way makes a stream object each time, for 4 us; this is the one that torch's own
        # compilers use. Where it is missing, the public one does.
        self.current_stream: Callable[[int], int] = getattr(
            torch._C, "_cuda_getCurrentRawStream", self._public_stream
        )
        _check("cuInit", bindings.cuInit(0))
        # How often another process's memory was mapped.
        self.ipc_opens = 0

    # ---- devices -----------------------------------------------------------------------------

    def current_device(self) -> int:
        device: int = self._torch.cuda.current_device()
        return device

    def _public_stream(self, device: int) -> int:
        stream: int = self._torch.cuda.current_stream(device).cuda_stream
        return stream

    def uuid(self, device: int) -> bytes:
        ask = getattr(self._cuda, "cuDeviceGetUuid_v2", self._cuda.cuDeviceGetUuid)
        return bytes(_check("cuDeviceGetUuid", ask(self._device(device))).bytes)

    def find(self, uuid: bytes) -> int | None:
        for device in range(self._torch.cuda.device_count()):
            if self.uuid(device) == uuid:
                return device
        return None

    def _device(self, device: int) -> Any:  # noqa: ANN401
        return _check("cuDeviceGet", self._cuda.cuDeviceGet(device))

    def _context(self, device: int) -> Any:  # noqa: ANN401
        """The device's primary context, which is torch's, held until the process ends."""
        context = self._contexts.get(device)
        if context is None:
            retain = self._cuda.cuDevicePrimaryCtxRetain
            context = _check("cuDevicePrimaryCtxRetain", retain(self._device(device)))
            self._contexts[device] = context
            self._addresses[device] = int(context)
        return context

    @contextmanager
    def _current(self, device: int) -> Iterator[None]:
        """The device's context is the thread's current one meanwhile."""
        _check("cuCtxPushCurrent", self._cuda.cuCtxPushCurrent(self._context(device)))
        try:
            yield
        finally:
            _check("cuCtxPopCurrent", self._cuda.cuCtxPopCurrent())

    # ---- memory ------------------------------------------------------------------------------

    def allocate(self, device: int, size: int) -> int:
        with self._current(device):
            return int(_check("cuMemAlloc", self._cuda.cuMemAlloc(size)))

    def free(self, device: int, address: int) -> None:
        with self._current(device):
            _check("cuMemFree", self._cuda.cuMemFree(address))

    def export(self, device: int, address: int) -> bytes:
        with self._current(device):
            handle = _check("cuIpcGetMemHandle", self._cuda.cuIpcGetMemHandle(address))
            return bytes(handle.reserved)

    def open(self, device: int, handle: bytes) -> int:
        memory = self._cuda.CUipcMemHandle()
        memory.reserved = handle
        self.ipc_opens += 1
        with self._current(device):
            answer = self._cuda.cuIpcOpenMemHandle(memory, _IPC_LAZY_PEER_ACCESS)
            return int(_check("cuIpcOpenMemHandle", answer))

    def close(self, device: int, address: int) -> None:
        with self._current(device):
            _check("cuIpcCloseMemHandle", self._cuda.cuIpcCloseMemHandle(address))

    def register(self, device: int, address: int, size: int) -> int:
        with self._current(device):
            register = self._cuda.cuMemHostRegister
            _check("cuMemHostRegister", register(address, size, _REGISTER_PORTABLE_MAPPED))
            answer = self._cuda.cuMemHostGetDevicePointer(address, 0)
            return int(_check("cuMemHostGetDevicePointer", answer))

    def unregister(self, device: int, address: int) -> None:
        with self._current(device):
            _check("cuMemHostUnregister", self._cuda.cuMemHostUnregister(address))

    # ---- streams -----------------------------------------------------------------------------

    def write(self, device: int, stream: int, address: int, value: int) -> None:
        # (Twice the same lines: each call of a function costs, and a publish is one of these.)
        addresses = self._addresses
        if stream > _LAST_OF_THE_CONTEXT or int(self._get_current()[1]) == addresses.get(device):
            answer = self._write(stream, address, value, _WRITE_DEFAULT)
            if answer[0] == 0:
                return
        self._once_more(self._write, device, (stream, address, value, _WRITE_DEFAULT))

    def wait(self, device: int, stream: int, address: int, value: int) -> None:
        addresses = self._addresses
        if stream > _LAST_OF_THE_CONTEXT or int(self._get_current()[1]) == addresses.get(device):
            answer = self._wait(stream, address, value, _WAIT_GEQ)
            if answer[0] == 0:
                return
        self._once_more(self._wait, device, (stream, address, value, _WAIT_GEQ))

    def _once_more(
        self,
        call: Any,  # noqa: ANN401
        device: int,
        arguments: tuple[int, int, int, int],
    ) -> None:
        """With the device's context: a thread that has not used CUDA yet has none, and the default
        stream is that of the context that is current. What failed for another reason does again.
        """
        with self._current(device):
            _check(call.__name__, call(*arguments))

    def may_be_captured(self, stream: int) -> bool:
        return stream > _LAST_OF_THE_CONTEXT

    def is_capturing(self, device: int, stream: int) -> bool:
        if not self.may_be_captured(stream):
            # Asking a default stream while another is being captured would break that capture.
            return False
        error, status = self._is_capturing(stream)
        if int(error) == _INVALID_CONTEXT:
            with self._current(device):
                error, status = self._is_capturing(stream)
        return bool(int(_check("cuStreamIsCapturing", (error, status))) != _NOT_CAPTURING)

    def synchronize(self, device: int) -> None:
        with self._current(device):
            _check("cuCtxSynchronize", self._cuda.cuCtxSynchronize())

    def bytes_at(
        self, device: int, home: int | None, address: int, size: int, owner: object
    ) -> torch.Tensor:
        if home == device:
            array = _Array(owner, address, size)
            return self._torch.as_tensor(array, device=f"cuda:{device}")  # type: ignore[no-any-return]
        from shmblocks.cuda.dlpack import bytes_tensor

        return bytes_tensor(device, address, size, owner)


class _Array:
    """Device memory as torch takes it over; torch keeps this object with the tensor."""

    def __init__(self, owner: object, address: int, size: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "strides": None,
            "data": (address, False),
        }


def _check(call: str, answer: tuple[Any, ...]) -> Any:  # noqa: ANN401
    """The value of a call of cuda.bindings, which returns (error, value) or (error,)."""
    error, *values = answer
    if int(error):
        raise CudaUnavailableError(f"{call}: {getattr(error, 'name', error)}")
    return values[0] if values else None
