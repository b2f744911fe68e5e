"""Device memory as a torch tensor on a device that is not the one it lies on.

A process may open the pool's memory for its own device and reach it over NVLink or PCIe. Torch's
usual way (`__cuda_array_interface__`) asks the driver where the memory lies, puts the tensor on
that device, and the first kernel on it then makes a context there: some 500 MiB on the producer's
GPU for each reader. A DLPack capsule says the device itself.

Layout of the structures: dlpack.h, version 0.8 (`DLManagedTensor`).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CUDA = 2
_UNSIGNED = 1


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", _Deleter),
    )


# What living tensors stand on, by the address of their structure: taken out by the deleter.
_held: dict[int, tuple[_Managed, object, object]] = {}


def _delete(address: int) -> None:
    _held.pop(address, None)


_deleter = _Deleter(_delete)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def bytes_tensor(device: int, address: int, size: int, owner: object) -> torch.Tensor:
    """uint8 `[size]` on `device`; keeps `owner` alive."""
    from torch.utils.dlpack import from_dlpack

    shape = (ctypes.c_int64 * 1)(size)
    managed = _Managed(
        tensor=_Tensor(
            data=address,
            device=_Device(_CUDA, device),
            ndim=1,
            dtype=_DataType(_UNSIGNED, 8, 1),
            shape=shape,
            strides=None,
            byte_offset=0,
        ),
        manager=None,
        deleter=_deleter,
    )
    where = ctypes.addressof(managed)
    _held[where] = (managed, shape, owner)
    capsule = _new_capsule(where, b"dltensor", None)
    try:
        return from_dlpack(capsule)
    except BaseException:
        _held.pop(where, None)
        raise
