"""Where a pool's fields lie: in its segment, or in CUDA memory beside it.

Imports `shmblocks.cuda` only for a pool that is on a GPU: processes without one never pay for it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec

from shmblocks._state.pool_state import PoolState
from shmblocks.config import PoolConfig
from shmblocks.view import FieldTensors, HostMemory

if TYPE_CHECKING:
    import torch

    from shmblocks.cuda.memory import DeviceMemory


def placed(config: PoolConfig, device: str | torch.device | None) -> PoolConfig:
    """The config with its fields on that device (None: where it says)."""
    if device is None:
        return config
    return msgspec.structs.replace(config, device=_device_name(device))


def _device_name(device: str | torch.device) -> str:
    """`cuda` is the current device, as in torch."""
    name = str(device)
    if name == "cuda":
        from shmblocks.cuda.driver import load

        return f"cuda:{load().current_device()}"
    return name


def allocate_on_gpu(state: PoolState) -> None:
    """As the creator of a CUDA pool: make its device memory, and say where others find it."""
    from shmblocks.cuda.use import GpuUse

    use = GpuUse.start(state)
    use.allocate(int(state.config.device.partition(":")[2]), state.layout.device_bytes)
    use.register()


def field_tensors(state: PoolState) -> FieldTensors:
    """The fields of a pool as tensors to write to, wherever they lie."""
    host = HostMemory(state.segment.mapping)
    if not state.config.is_on_gpu:
        return FieldTensors(state.config, state.layout, host)
    from shmblocks.cuda.memory import DeviceFields

    # By the state, not by the pool: tensors do not keep a pool from being dropped.
    device = DeviceFields(functools.partial(_open_device_memory, state))
    return FieldTensors(state.config, state.layout, host, device)


def read_only_tensors(state: PoolState) -> FieldTensors:
    """The fields and aux of a pool in host memory, through a mapping that cannot be written to."""
    start = state.layout.aux
    mapping = state.segment.readonly_mapping(start, state.layout.segment_bytes - start)
    return FieldTensors(state.config, state.layout, HostMemory(mapping, start))


def _open_device_memory(state: PoolState) -> DeviceMemory:
    from shmblocks.cuda.use import GpuUse

    return GpuUse.start(state).memory()
