"""Builds the compiled core where there is a compiler; without one the Python does the same.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
CORE = Path("shmblocks/_core")

core = Extension(
    "shmblocks._core._native",
    sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / CORE).glob("*.c")),
    depends=[str(CORE / "core.h"), str(CORE / "layout.h")],
    define_macros=[("_GNU_SOURCE", "1")],
    extra_compile_args=["-std=c11", "-O2", "-fvisibility=hidden"],
    extra_link_args=["-s"],  # no symbols: a twentieth of the size
    # A build that fails is told, and the package is installed without it.
    optional=True,
)

# The core relies on the interpreter's lock.
is_free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(ext_modules=[] if is_free_threaded else [core])
