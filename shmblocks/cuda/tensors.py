"""The fields of a CUDA pool as torch tensors on its device memory. `aux` stays in host memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING

from shmblocks._state.layout import Layout
from shmblocks.config import PoolConfig
from shmblocks.cuda.memory import DeviceMemory
from shmblocks.view import FieldTensors

if TYPE_CHECKING:
    import torch


class DeviceTensors(FieldTensors):
    """`FieldTensors` over device memory, which the first tensor opens."""

    def __init__(
        self,
        mapping: mmap.mmap,
        config: PoolConfig,
        layout: Layout,
        memory: Callable[[], DeviceMemory],
    ) -> None:
        super().__init__(mapping, config, layout)
        self._memory = memory
        self._bytes: torch.Tensor | None = None

    def field_bytes(self, offset: int, size: int) -> torch.Tensor:
        data = self._bytes
        if data is None:
            memory = self._memory()
            data = memory.gpu.bytes_at(
                memory.device, memory.home, memory.address, memory.size_bytes, memory
            )
            self._bytes = data
        return data[offset : offset + size]
