"""What a machine without a GPU lacks for SGLang's wheel. Only through PYTHONPATH; nothing of what
the cases test is a stub.

sgl_kernel   (sglang-kernel: CUDA binaries of 1.2 GB) each attribute is a function that raises
triton       (1 GB) decorators that return the function, empty classes; nothing of it ever runs
torchvision  PyPI's wheel is a CUDA build, whose _C.so does not load beside torch for CPUs: two
             operators are declared
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence

# Operators that SGLang's Qwen3.5 files take from torch.ops when they are imported; never called.
IMPORTED_OPS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)


class Kernels(types.ModuleType):
    """sgl_kernel: no submodules, so that SGLang's own `except ImportError` branches run."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)

        def stub(*args: object, **kwargs: object) -> object:
            raise NotImplementedError(f"sgl_kernel.{name}: this machine has no GPU")

        return stub


def _take_anything(self: object, *args: object, **kwargs: object) -> None:
    """The `__init__` of an empty class."""


class Nothing:
    """A decorator, a decorator factory, a type: whatever the files of kernels ask for."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "active":
            raise RuntimeError("0 active drivers")  # as triton says itself without a GPU
        return type(name, (), {"__init__": _take_anything}) if name[0].isupper() else self

    def __getitem__(self, key: object) -> object:
        return self

    def __mro_entries__(self, bases: tuple[type, ...]) -> tuple[type, ...]:
        return ()


NOTHING = Nothing()


class Triton(types.ModuleType):
    """A package with every submodule and every name."""

    __path__: list[str] = []  # noqa: RUF012
    __version__ = "3.0.0"

    def __getattr__(self, name: str) -> object:
        return getattr(NOTHING, name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds them before anybody else does."""

    def __init__(self) -> None:
        # Kept: what a library has declared goes with it.
        self.libraries: list[object] = []
        self.has_torchvision = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision._meta_registrations" and not self.has_torchvision:
            self.has_torchvision = True
            arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            self.declare("torchvision", "DEF", [op + arguments for op in ("nms", "qnms")])
        if name == "sgl_kernel":
            return importlib.machinery.ModuleSpec(name, self)
        if name == "triton" or name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def declare(self, namespace: str, kind: str, operators: Sequence[str]) -> None:
        import torch

        library = torch.library.Library(namespace, kind)  # type: ignore[no-untyped-call]
        for operator in operators:
            library.define(operator)  # type: ignore[no-untyped-call]
        self.libraries.append(library)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return (Kernels if spec.name == "sgl_kernel" else Triton)(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "sgl_kernel":
            self.declare("sgl_kernel", "FRAGMENT", [f"{op}(Tensor a) -> ()" for op in IMPORTED_OPS])


sys.meta_path.insert(0, Finder())
