"""Builds the compiled core into the checkout, as `scripts/core` says."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "shmblocks/_core"

WARNINGS = ("-Wall", "-Wextra", "-Werror")
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")

# What `scripts/core sanitize` runs: everything that the core does, and nothing that kills.
TESTS = (
    "tests/compiled/test_twins.py",
    "tests/channel/test_channel.py",
    "tests/core/test_views.py",
    "tests/core/test_storages.py",
    "tests/core/test_leases.py",
    "tests/queue/test_messages.py",
)


def sources() -> list[Path]:
    """What the extension is made of."""
    return sorted(CORE.glob("*.[ch]"))


def target(name: str = "_native") -> Path:
    """Where an extension of that name lies for this Python."""
    return CORE / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def is_fresh(name: str = "_native") -> bool:
    """Whether it was built from the sources that are there."""
    built = target(name)
    return built.exists() and all(
        path.stat().st_mtime <= built.stat().st_mtime for path in sources()
    )


def build(name: str = "_native", *flags: str) -> Path:
    """Compile; the file is replaced in one step, so that others may use the old one meanwhile."""
    built = target(name)
    with tempfile.TemporaryDirectory(dir=CORE) as folder:
        made = Path(folder) / built.name
        command = [
            os.environ.get("CC", "gcc"),
            *FLAGS,
            *WARNINGS,
            *flags,
            f"-I{sysconfig.get_path('include')}",
            *(str(path) for path in sources() if path.suffix == ".c"),
            "-o",
            str(made),
        ]
        subprocess.run(command, check=True)
        made.replace(built)
    return built


def sanitize() -> int:
    """Build with sanitizers, run the tests with it, and put back the normal build."""
    libraries = [_library("libasan.so"), _library("libubsan.so")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # Python frees little at its end; what is leaked by the core shows in the twins' counts.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    build("_native", *SANITIZERS)
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    finally:
        build()


def _library(name: str) -> str:
    compiler = os.environ.get("CC", "gcc")
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
    )
    return found.stdout.strip()


def main(arguments: list[str]) -> int:
    what = arguments[0] if arguments else "core"
    if what == "sanitize":
        return sanitize()
    if what == "faults":
        print(build("_faults", "-DSHMBLOCKS_FAULTS"))
        return 0
    print(build())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
