"""Torch and CUDA, tried in a process of their own: what pools on GPU 0 need.

`torch_and_cuda` is the check; `main` runs in the child (see `child`). It imports torch, pins a
piece of shared memory, lets a stream write a word into it, and has a second process open GPU
memory.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from shmblocks._os.segment import SHM_DIRECTORY
from shmblocks.doctor.child import report, run_module
from shmblocks.doctor.host import CheckResult, Host

# Importing torch from a cold disk and starting CUDA takes many seconds.
# Smaller: slow machines fail. Larger: a hung driver holds the doctor up longer.
PROBE_SECONDS = 120.0

SIZE_BYTES = 1 << 21
WORD = 0x5348_4D42_4C4F_434B
OPEN_SECONDS = 60.0
_WRITE_VALUE_DEFAULT = 0
_HOST_REGISTER_PORTABLE_MAPPED = 1 | 2
_IPC_LAZY_PEER_ACCESS = 1
_STREAM_NON_BLOCKING = 1

# Where the kernel module says its version, in the last number of its first line.
DRIVER_FILE = "/proc/driver/nvidia/version"

DRIVER_ADVICE = "update the NVIDIA driver, and see that the container may use the GPU"


class CudaCallError(Exception):
    """A CUDA call that did not return success."""


def torch_and_cuda(host: Host) -> Iterator[CheckResult]:
    """A missing torch, a missing GPU and a driver that crashes are findings."""
    yield from run_module("cuda", "shmblocks.doctor.cuda", [], PROBE_SECONDS)


# ---- in the child ----------------------------------------------------------------------------


def probe() -> Iterator[CheckResult]:
    """All checks; the later ones only where the earlier ones leave a way."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        found = f"torch cannot be imported: {error}"
        yield CheckResult("torch", "fail", found, "pip install torch")
        return
    yield CheckResult("torch", "ok", f"torch {torch.__version__}")
    devices = _devices(torch)
    yield devices
    if devices.status == "ok":
        yield from _bindings()


def _devices(torch: ModuleType) -> CheckResult:
    has_driver = os.path.exists("/dev/nvidiactl")
    if torch.version.cuda is None:
        found = f"torch {torch.__version__} is a build without CUDA: pools in host memory only"
        advice = "install a CUDA build of torch to use the GPU here" if has_driver else ""
        return CheckResult("cuda-devices", "warn" if has_driver else "skip", found, advice)
    if not torch.cuda.is_available():
        found = "torch sees no GPU: pools in host memory only"
        advice = DRIVER_ADVICE if has_driver else ""
        return CheckResult("cuda-devices", "warn" if has_driver else "skip", found, advice)
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(place) for place in range(count)})
    return CheckResult("cuda-devices", "ok", f"{count} x {', '.join(names)}")


def _bindings() -> Iterator[CheckResult]:
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        runtime = importlib.import_module("cuda.bindings.runtime")
        version = importlib.import_module("cuda.bindings").__version__
    except (ImportError, OSError, RuntimeError) as error:
        found = f"cuda.bindings cannot be imported ({error}): pools in host memory only"
        yield CheckResult("cuda-bindings", "warn", found, "pip install cuda-bindings")
        return
    number = _call(runtime.cudaDriverGetVersion())
    found = (
        f"cuda.bindings {version}; driver {_driver_version()}; the driver supports CUDA "
        f"{number // 1000}.{number % 1000 // 10}"
    )
    yield CheckResult("cuda-bindings", "ok", found)
    yield from _pinned(driver, runtime)
    yield from _shared(runtime)


def _driver_version() -> str:
    try:
        with open(DRIVER_FILE) as file:
            found = re.search(r"\s(\d+(?:\.\d+)+)\s", file.readline())
    except OSError:
        found = None
    return found[1] if found else "of unknown version"


def _pinned(driver: ModuleType, runtime: ModuleType) -> Iterator[CheckResult]:
    with tempfile.TemporaryFile(dir=SHM_DIRECTORY) as file:
        os.posix_fallocate(file.fileno(), 0, SIZE_BYTES)
        with mmap.mmap(file.fileno(), SIZE_BYTES) as pages:
            words = (ctypes.c_uint64 * 1).from_buffer(pages)
            yield from _pinned_words(driver, runtime, words)
            del words  # an exported buffer would keep the mapping from being closed


def _pinned_words(
    driver: ModuleType, runtime: ModuleType, words: ctypes.Array[ctypes.c_uint64]
) -> Iterator[CheckResult]:
    address = ctypes.addressof(words)
    try:
        _call(runtime.cudaHostRegister(address, SIZE_BYTES, _HOST_REGISTER_PORTABLE_MAPPED))
    except CudaCallError as error:
        found = f"cudaHostRegister of shared memory: {error}"
        yield CheckResult("cuda-pinning", "fail", found, DRIVER_ADVICE)
        return
    yield CheckResult("cuda-pinning", "ok", "shared memory can be registered with the driver")
    try:
        _write_word(driver, runtime, address)
        seen = words[0] == WORD
        found = f"cuStreamWriteValue64: the word {'arrived' if seen else 'did not arrive'}"
        yield CheckResult("cuda-stream-words", "ok" if seen else "fail", found)
    except CudaCallError as error:
        found = f"cuStreamWriteValue64: {error}"
        yield CheckResult("cuda-stream-words", "fail", found, DRIVER_ADVICE)
    finally:
        _call(runtime.cudaHostUnregister(address))


def _write_word(driver: ModuleType, runtime: ModuleType, address: int) -> None:
    """A stream writes WORD at `address`, and is waited for."""
    device_address = _call(runtime.cudaHostGetDevicePointer(address, 0))
    stream = _call(driver.cuStreamCreate(_STREAM_NON_BLOCKING))
    try:
        _call(driver.cuStreamWriteValue64(stream, device_address, WORD, _WRITE_VALUE_DEFAULT))
        _call(driver.cuStreamSynchronize(stream))
    finally:
        _call(driver.cuStreamDestroy(stream))


def _shared(runtime: ModuleType) -> Iterator[CheckResult]:
    pointer = None
    try:
        pointer = _call(runtime.cudaMalloc(SIZE_BYTES))
        handle = bytes(_call(runtime.cudaIpcGetMemHandle(pointer)).reserved)
    except CudaCallError as error:
        found = f"cudaIpcGetMemHandle: {error}"
        yield CheckResult("cuda-ipc", "fail", found, DRIVER_ADVICE)
    else:
        arguments = ["--open", handle.hex()]
        yield from run_module("cuda-ipc", "shmblocks.doctor.cuda", arguments, OPEN_SECONDS)
    finally:
        if pointer is not None:
            _call(runtime.cudaFree(pointer))


def open_shared(handle: bytes) -> Iterator[CheckResult]:
    """The second process's side of `cuda-ipc`."""
    runtime = importlib.import_module("cuda.bindings.runtime")
    memory = runtime.cudaIpcMemHandle_t()
    memory.reserved = handle
    try:
        pointer = _call(runtime.cudaIpcOpenMemHandle(memory, _IPC_LAZY_PEER_ACCESS))
        _call(runtime.cudaIpcCloseMemHandle(pointer))
    except CudaCallError as error:
        found = f"cudaIpcOpenMemHandle in a second process: {error}"
        advice = "give the processes the same GPUs, and containers the same driver"
        yield CheckResult("cuda-ipc", "fail", found, advice)
        return
    yield CheckResult("cuda-ipc", "ok", "GPU memory of one process was opened by a second one")


def _call(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401
    """The value of a call of cuda.bindings, which returns (error, value) or (error,).

    `Any`, since that package is not there when types are checked.
    """
    error, *values = answer
    if getattr(error, "value", error) != 0:
        raise CudaCallError(str(getattr(error, "name", error)))
    return values[0] if values else None


def main(arguments: list[str]) -> None:
    """Print what is found; with `--open HANDLE`, of opening another process's GPU memory."""
    if arguments[:1] == ["--open"] and len(arguments) == 2:
        report(open_shared(bytes.fromhex(arguments[1])))
    else:
        report(probe())
