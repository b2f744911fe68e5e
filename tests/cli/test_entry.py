"""The command as a process of its own: entry points, broken pipes, what it imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from shmblocks.cli.commands import DoctorReport
from shmblocks.cli.stat import PoolReport
from shmblocks.doctor import CheckResult
from tests.cli.conftest import Scene
from tests.support.children import run_program

COMMAND = (sys.executable, "-m", "shmblocks.cli")


def test_the_installed_command_is_main() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'^shmblocks = "shmblocks\.cli\.main:main"$', text, re.MULTILINE)


def test_the_command_answers_as_a_program(scene: Scene) -> None:
    done = run_program([*COMMAND, "stat", scene.name, "--json"])
    assert msgspec.json.decode(done.stdout, type=PoolReport).stats.name == scene.name
    refused = run_program([*COMMAND, "rm", scene.name], returncode=1)
    assert refused.stderr.startswith("shmblocks: ")


def test_a_reader_that_went_away_is_no_error(scene: Scene) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*COMMAND, "map", scene.name],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_command_line_starts_without_torch() -> None:
    program = (
        "import sys, shmblocks.cli.main as cli; code = cli.main(['ls']); "
        "slow = [name for name in ('torch', 'numpy', 'rich') if name in sys.modules]; "
        "sys.exit(code or slow or 0)"
    )
    run_program([sys.executable, "-c", program])


def test_the_doctor_finds_out_that_pools_can_be_shared_here() -> None:
    done = run_program([*COMMAND, "doctor", "--json"], returncode=None)
    report = msgspec.json.decode(done.stdout, type=DoctorReport)
    failed = [check for check in report.checks if check.status == "fail"]
    assert (done.returncode, report.healthy) == ((1, False) if failed else (0, True))
    statuses = {check.name: check.status for check in report.checks}
    assert len(statuses) == len(report.checks), "each check has a name of its own"
    for name in ("ofd-locks", "unnamed-files", "futex", "pool-sharing", "torch"):
        assert statuses[name] == "ok", report
    assert "cuda-devices" in statuses


def probe(folder: Path, files: dict[str, str]) -> list[CheckResult]:
    """What the CUDA probe finds with other packages in front of the installed ones."""
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    root = Path(__file__).parents[2]
    done = run_program(
        [sys.executable, "-c", "from shmblocks.doctor import cuda; cuda.main([])"],
        environment={"PYTHONPATH": f"{folder}:{root}"},
    )
    return [msgspec.json.decode(line, type=CheckResult) for line in done.stdout.splitlines()]


def test_a_missing_torch_is_a_finding(tmp_path: Path) -> None:
    (result,) = probe(tmp_path, {"torch/__init__.py": "raise ImportError('no torch here')\n"})
    assert (result.name, result.status) == ("torch", "fail")
    assert "no torch here" in result.found
    assert "pip install torch" in result.advice


TORCH = """\
__version__ = "2.13.0+cu130"
class version: cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    get_device_name = staticmethod(lambda place: "Test GPU")
"""


def test_a_gpu_without_bindings_is_a_warning(tmp_path: Path) -> None:
    files = {
        "torch/__init__.py": TORCH,
        "cuda/__init__.py": "",
        "cuda/bindings/__init__.py": "raise ImportError('no bindings')\n",
    }
    results = {result.name: result for result in probe(tmp_path, files)}
    assert results["cuda-devices"].found == "2 x Test GPU"
    assert results["cuda-bindings"].status == "warn"
    assert "cuda-ipc" not in results


RUNTIME = """\
class Error:
    def __init__(self, value): self.value, self.name = value, "cudaErrorTest"
OK, FAILED = Error(0), Error(304)
class cudaIpcMemHandle_t: reserved = bytes(64)
cudaDriverGetVersion = lambda: (OK, 13010)
cudaHostRegister = lambda address, size, flags: (OK,)
cudaHostUnregister = lambda address: (OK,)
cudaHostGetDevicePointer = lambda address, flags: (OK, address)
cudaMalloc = lambda size: (OK, 4096)
cudaFree = lambda pointer: (OK,)
cudaIpcGetMemHandle = lambda pointer: (OK, cudaIpcMemHandle_t())
cudaIpcOpenMemHandle = lambda handle, flags: (FAILED, None)
"""
DRIVER = """\
import ctypes
class CUresult:
    value, name = 0, "CUDA_SUCCESS"
cuStreamCreate = lambda flags: (CUresult, 1)
cuStreamDestroy = lambda stream: (CUresult,)
cuStreamSynchronize = lambda stream: (CUresult,)
def cuStreamWriteValue64(stream, address, value, flags):
    ctypes.c_uint64.from_address(address).value = value
    return (CUresult,)
"""


@pytest.mark.parametrize(
    ("driver", "status"), [(DRIVER, "ok"), (DRIVER.replace("value = value", "value = 0"), "fail")]
)
def test_each_cuda_piece_is_a_finding_of_its_own(tmp_path: Path, driver: str, status: str) -> None:
    files = {
        "torch/__init__.py": TORCH,
        "cuda/__init__.py": "",
        "cuda/bindings/__init__.py": "__version__ = '13.0.1'\n",
        "cuda/bindings/runtime.py": RUNTIME,
        "cuda/bindings/driver.py": driver,
    }
    results = {result.name: result for result in probe(tmp_path, files)}
    assert results["cuda-bindings"].found.endswith("the driver supports CUDA 13.1")
    assert results["cuda-pinning"].status == "ok"
    assert results["cuda-stream-words"].status == status
    assert results["cuda-ipc"].status == "fail"
    assert "cudaErrorTest" in results["cuda-ipc"].found
