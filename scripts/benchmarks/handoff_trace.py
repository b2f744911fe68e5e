"""`scripts/handoff_trace [PACKAGE]`: what one handoff does inside of shmblocks, counted.

Counts do not depend on the machine, so they show what a change of the code did before any clock
can. For each step of a handoff (without contention, the consumer awake):

- *frames*: Python functions of the package that were called;
- *other file*: those of them that were called from another file of the package;
- *upward*: those of them that were called from a lower layer than their own. Imports show no such
  call where a function is passed as a value. The layers are those of `tests/test_project.py` in the
  package's checkout: a module or folder is a part, a row of the table a layer;
- *locks*: critical sections (each an flock to enter and one to leave), with *flocks*, the calls;
- *structs*: calls of `struct.Struct` methods.

PACKAGE is the folder of the package to count, of any version: by default this checkout's.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from benchmarks.table import Grid, drawn

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 2000
FIELD = "input_embeddings"
# Handoffs before the one that is counted: the first ones import and register.
WARM_UP = 3
STRUCT_METHODS = ("pack", "pack_into", "unpack", "unpack_from")


@dataclass
class Counts:
    """Of one step."""

    frames: int = 0
    other_file: int = 0
    upward: int = 0
    sections: int = 0
    flocks: int = 0
    structs: int = 0
    calls: list[str] = field(default_factory=list)

    def numbers(self) -> list[int]:
        return [
            self.frames, self.other_file, self.upward, self.sections, self.flocks, self.structs,
        ]  # fmt: skip


class Tracer:
    """Counts what happens in the package while a step is open."""

    def __init__(self, package: Path, layers: dict[str, int]) -> None:
        self._package = str(package) + os.sep
        self._layers = layers
        self.steps: dict[str, Counts] = {}
        self._counts = Counts()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._counts = self.steps.setdefault(name, Counts())
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, called: object) -> None:
        if event == "call":
            self._call(frame)
        elif event == "c_call" and self._file(frame) is not None:
            self._c_call(called)

    def _call(self, frame: FrameType) -> None:
        file = self._file(frame)
        if file is None:
            return
        counts = self._counts
        counts.frames += 1
        caller = frame.f_back and self._file(frame.f_back)
        is_upward = False
        if caller is not None and caller != file:
            counts.other_file += 1
            is_upward = self._layers[part_of(caller)] < self._layers[part_of(file)]
            counts.upward += is_upward
        mark = "  upward" if is_upward else ""
        counts.calls.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}{mark}")

    def _c_call(self, called: object) -> None:
        name = getattr(called, "__name__", "")
        if called is fcntl.flock:
            self._counts.flocks += 1
            # Half of them enter. An operation that raises in between leaves all the same.
            self._counts.sections = self._counts.flocks // 2
        elif name in STRUCT_METHODS:
            owner = getattr(called, "__self__", None)
            self._counts.structs += isinstance(owner, struct.Struct) or owner is struct

    def _file(self, frame: FrameType) -> str | None:
        """Where it is in the package; None outside of it."""
        path = frame.f_code.co_filename
        return path[len(self._package) :] if path.startswith(self._package) else None


def part_of(file: str) -> str:
    """The module or folder directly below the package."""
    return file.partition(os.sep)[0].removesuffix(".py")


def layers_of(package: Path) -> dict[str, int]:
    """Part -> its row of the table in the checkout's tests, 0 the lowest."""
    tests = package.parent / "tests" / "test_project.py"
    for node in ast.parse(tests.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LAYERS" and node.value:
            rows: tuple[tuple[str, ...], ...] = ast.literal_eval(node.value)
            return {part: height for height, row in enumerate(rows) for part in row}
    raise LookupError(f"{tests}: expected a table LAYERS, found none")


def trace_handoffs(package: Path) -> dict[str, Tracer]:
    """The handoffs that the package offers, each traced once it is warm."""
    sys.path.insert(0, str(package.parent))
    import shmblocks

    if Path(shmblocks.__file__).resolve().parent != package:
        raise ImportError(f"expected the shmblocks of {package}, got {shmblocks.__file__}")
    from shmblocks import BlockHandle, BlockPool, HandleQueue, PoolConfig, multimodal_fields

    layers = layers_of(package)
    config = PoolConfig(total_tokens=8192, fields=multimodal_fields(hidden_size=64))
    name = f"handoff-trace-{os.getpid()}"
    found: dict[str, Tracer] = {}
    with (
        BlockPool.create(name, config, prefault="off") as pool,
        closing(HandleQueue.create(f"{name}-queue", message_type=BlockHandle)) as queue,
    ):

        def alloc(tracer: Tracer) -> BlockHandle:
            with tracer.step("alloc"):
                handle = pool.alloc(TOKENS, req_id="request-1")
            if handle is None:
                raise RuntimeError("expected room in an empty pool")
            with tracer.step("view"):
                view = pool.view(handle)
            with tracer.step("view[name]"):
                view[FIELD]
            with tracer.step("publish"):
                return pool.publish(handle)

        ways: dict[str, Callable[[Tracer], BlockHandle]] = {"alloc": alloc}
        begin_reservation = getattr(pool, "reserve", None)  # older versions have none
        if begin_reservation is not None:

            def reserve(tracer: Tracer) -> BlockHandle:
                with tracer.step("reserve"):
                    reservation = begin_reservation(TOKENS, req_id="request-1")
                with reservation:
                    with tracer.step("reservation[name]"):
                        reservation[FIELD]
                    with tracer.step("publish"):
                        handle: BlockHandle = reservation.publish()
                return handle

            ways["reserve"] = reserve
        for way, begin in ways.items():
            for _ in range(WARM_UP):
                found[way] = tracer = Tracer(package, layers)
                handle = begin(tracer)
                with tracer.step("put"):
                    queue.put(handle)
                with tracer.step("get"):
                    handle = queue.get()
                with tracer.step("open"):
                    lease = pool.open(handle)
                with tracer.step("lease[name]"):
                    lease[FIELD]
                with tracer.step("release"):
                    lease.release()
    return found


def grid(way: str, tracer: Tracer) -> Grid:
    rows = [(name, counts.numbers()) for name, counts in tracer.steps.items()]
    total = [sum(column) for column in zip(*(numbers for _, numbers in rows), strict=True)]
    return Grid(
        f"One handoff by {way}: {total[0]} frames, {total[3]} sections, {total[2]} upward",
        ["", "frames", "other file", "upward", "sections", "flocks", "structs"],
        [[name, *map(str, numbers)] for name, numbers in [*rows, ("sum", total)]],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/handoff_trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", type=Path, nargs="?", default=ROOT / "shmblocks")
    parser.add_argument("--calls", action="store_true", help="name every call")
    options = parser.parse_args()
    package: Path = options.package.resolve()
    if not (package / "__init__.py").is_file():
        parser.error(f"expected the folder of a package, got {options.package}")
    for way, tracer in trace_handoffs(package).items():
        print(drawn(grid(way, tracer)), end="\n\n")
        if options.calls:
            for name, counts in tracer.steps.items():
                print(f"{name}\n  " + "\n  ".join(counts.calls), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
