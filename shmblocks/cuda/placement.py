"""Where a pool's fields lie: in its segment, or in CUDA memory beside it.

Imports `shmblocks.cuda` only for a pool that is on a GPU: processes without one never pay for it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec

from shmblocks._state.pool_state import Ledger
from shmblocks.config import PoolConfig
from shmblocks.view import FieldTensors

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


def allocate_on_gpu(ledger: Ledger) -> None:
    """As the creator of a CUDA pool: make its device memory, and say where others find it."""
    from shmblocks.cuda.use import GpuUse

    use = GpuUse.start(ledger)
    use.allocate(int(ledger.config.device.partition(":")[2]), ledger.layout.device_bytes)
    use.register()


def field_tensors(ledger: Ledger) -> FieldTensors:
    """The fields of a pool as tensors, wherever they lie."""
    mapping = ledger.segment.mapping
    if not ledger.config.is_on_gpu:
        return FieldTensors(mapping, ledger.config, ledger.layout)
    from shmblocks.cuda.tensors import DeviceTensors

    # By the ledger, not by the pool: tensors do not keep a pool from being dropped.
    open_memory = functools.partial(_open_device_memory, ledger)
    return DeviceTensors(mapping, ledger.config, ledger.layout, open_memory)


def _open_device_memory(ledger: Ledger) -> DeviceMemory:
    from shmblocks.cuda.use import GpuUse

    return GpuUse.start(ledger).memory()
