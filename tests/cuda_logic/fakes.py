"""A driver without a GPU: streams are lists that the test works off, device memory is a bytearray.

Words are written into the segment as a GPU would, when the test says so: `gpu.run(stream)`.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from shmblocks import CudaUnavailableError

STREAM = 77
OTHER_STREAM = 88
UUID = b"a-fake-gpu-uuid!"


class Wait(NamedTuple):
    """A stream stops here until the word has reached the value."""

    address: int
    value: int


class Write(NamedTuple):
    """The stream writes a word."""

    address: int
    value: int


class FakeGpu:
    """`shmblocks.cuda.driver.Gpu` for tests."""

    def __init__(self) -> None:
        self.streams: dict[int, list[Wait | Write | Callable[[], object]]] = {}
        self.allocated: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.opened: dict[int, int] = {}
        self.registered: dict[int, int] = {}
        self.capturing: set[int] = set()
        self.current = STREAM
        self.synchronized = 0
        self.ipc_opens = 0
        self.refuses_to_register = False
        self.fails_to_enqueue = False
        self.is_blind = False
        self._numbers = itertools.count(1)

    # ---- what the library calls --------------------------------------------------------------

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: int) -> int:
        return self.current

    def uuid(self, device: int) -> bytes:
        return UUID

    def find(self, uuid: bytes) -> int | None:
        return None if self.is_blind or uuid != UUID else 0

    def allocate(self, device: int, size: int) -> int:
        memory = ctypes.create_string_buffer(size)
        address = ctypes.addressof(memory)
        self.allocated[address] = memory
        return address

    def free(self, device: int, address: int) -> None:
        del self.allocated[address]

    def export(self, device: int, address: int) -> bytes:
        return address.to_bytes(64, "little")

    def open(self, device: int, handle: bytes) -> int:
        self.ipc_opens += 1
        address = int.from_bytes(handle, "little")
        if address not in self.allocated:
            raise CudaUnavailableError("cuIpcOpenMemHandle: CUDA_ERROR_INVALID_HANDLE")
        self.opened[address] = self.opened.get(address, 0) + 1
        return address

    def close(self, device: int, address: int) -> None:
        self.opened[address] -= 1

    def register(self, device: int, address: int, size: int) -> int:
        if self.refuses_to_register:
            raise CudaUnavailableError("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY")
        assert address not in self.registered, "registered twice"
        self.registered[address] = size
        return address

    def unregister(self, device: int, address: int) -> None:
        del self.registered[address]

    def write(self, device: int, stream: int, address: int, value: int) -> None:
        self._enqueue(stream, Write(address, value))

    def wait(self, device: int, stream: int, address: int, value: int) -> None:
        self._enqueue(stream, Wait(address, value))

    def _enqueue(self, stream: int, step: Wait | Write) -> None:
        if self.fails_to_enqueue:
            raise CudaUnavailableError("cuStreamWriteValue64: CUDA_ERROR_ILLEGAL_ADDRESS")
        assert any(
            begin <= step.address < begin + size for begin, size in self.registered.items()
        ), "a word that is not registered"
        self.streams.setdefault(stream, []).append(step)

    def may_be_captured(self, stream: int) -> bool:
        return True

    def is_capturing(self, device: int, stream: int) -> bool:
        return stream in self.capturing

    def synchronize(self, device: int) -> None:
        self.synchronized += 1
        for stream in list(self.streams):
            self.run(stream)

    def bytes_at(
        self, device: int, home: int | None, address: int, size: int, owner: object
    ) -> torch.Tensor:
        array = (ctypes.c_uint8 * size).from_address(address)
        array._keeps = owner  # type: ignore[attr-defined]
        return torch.frombuffer(array, dtype=torch.uint8)

    # ---- what the test calls -----------------------------------------------------------------

    def run(self, stream: int = STREAM) -> bool:
        """Work the stream off; False when it stopped at a wait."""
        steps = self.streams.get(stream, [])
        while steps:
            step = steps[0]
            if isinstance(step, Wait):
                # As the driver does: the sign of the 64-bit difference.
                if ctypes.c_int64(_word(step.address).value - step.value).value < 0:
                    return False
            elif isinstance(step, Write):
                _word(step.address).value = step.value
            else:
                step()
            steps.pop(0)
        return True

    def work(self, step: Callable[[], object], stream: int = STREAM) -> None:
        """Enqueue something of the test's own."""
        self.streams.setdefault(stream, []).append(step)


def _word(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(address)
