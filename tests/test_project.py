"""What holds for the whole project: who may import whom, what is public, which Pythons parse it.

A new module of `shmblocks` must be put into `LAYERS`, a new public name into `PUBLIC`.
"""

from __future__ import annotations

import ast
import functools
import glob
import graphlib
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import shmblocks
from tests.support.children import run_program

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shmblocks"

# From the bottom to the top. A part imports parts of the lines above its own in this table, never
# one of its own line or below it. A package (transfer, doctor, cli, testing) is one part; inside of
# it there are only no circles. `__init__` is what `import shmblocks` gives.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "_words"),
    ("config", "handle", "keys"),
    ("_os", "_core"),
    ("_state",),
    ("queue", "view", "inspector"),
    ("_alloc_wait", "_claim_wait", "tickets"),
    ("cuda",),
    ("lease",),
    ("channel",),
    ("pool",),
    ("__init__",),
    ("nodes", "metrics", "traces"),
    ("cache", "sglang", "testing", "transfer"),
    ("sglang_plugin", "vllm", "vllm_omni"),
    ("doctor",),
    ("cli",),
)

PUBLIC: dict[str, set[str]] = {
    "shmblocks": {
        "AllocationInfo",
        "AuthenticationError",
        "BlockHandle",
        "BlockPool",
        "BlockView",
        "CacheStats",
        "Channel",
        "CounterValues",
        "CudaUnavailableError",
        "DamagedPoolError",
        "EntryInfo",
        "Field",
        "ForeignHandleError",
        "HandleQueue",
        "IncompatibleConfigError",
        "HistogramValues",
        "IncompatiblePoolError",
        "InvalidStateError",
        "KeyExistsError",
        "Lease",
        "LeaseInfo",
        "MalformedHandleError",
        "MalformedMessageError",
        "Namespace",
        "NodePeerInfo",
        "ParticipantId",
        "ParticipantInfo",
        "PeerDiedError",
        "PoolClosedError",
        "PoolConfig",
        "PoolExistsError",
        "PoolInspector",
        "PoolNotFoundError",
        "PoolPermissionError",
        "PoolSnapshot",
        "PoolStats",
        "PoolSummary",
        "PoolTimeoutError",
        "ReapReport",
        "Reservation",
        "SharedMemoryFullError",
        "ShmBlocksError",
        "StaleHandleError",
        "State",
        "TooManyLeasesError",
        "TooManyParticipantsError",
        "TooManyWaitersError",
        "TransferError",
        "UNBOUNDED",
        "UnsupportedPlatformError",
        "Violation",
        "WaiterInfo",
        "content_key",
        "list_pools",
        "multimodal_fields",
        "remove_dead_pools",
        "remove_pool",
    },
    "shmblocks.nodes": {
        "NodeServer",
        "NodeServerStats",
        "Nodes",
        "PeerInfo",
        "RemotePool",
        "RemotePoolStats",
        "ServedPool",
    },
    "shmblocks.traces": {"TracedPool"},
    "shmblocks.transfer": {
        "EmbeddingEndpoint",
        "EndpointStats",
        "LanguageEndpoint",
        "Mode",
        "QueueLike",
        "Receiver",
        "Sender",
        "Status",
        "TransferResult",
        "ZmqQueue",
        "relay_from",
        "relay_to",
    },
    "shmblocks.metrics": {
        "Metric",
        "MetricsServer",
        "PoolCollector",
        "Sample",
        "metric_names",
        "metrics_text",
        "read_metrics",
    },
    "shmblocks.sglang": {
        "EmbeddingRequest",
        "MetadataAllocation",
        "MultimodalDataBuffers",
        "MultimodalInputs",
        "ReqToMetadataBlockAllocator",
    },
    "shmblocks.vllm": {"ConnectorConfig", "register"},
    "shmblocks.sglang_plugin": {"load"},
    "shmblocks.testing": {
        "Coverage",
        "Ending",
        "Point",
        "Remembered",
        "Scope",
        "Step",
        "TooSlowError",
        "Wire",
        "abandon",
        "assert_accounted_for",
        "assert_clean",
        "assert_nothing_left",
        "assert_survives",
        "assert_unchanged",
        "cont",
        "die",
        "field_bytes",
        "interrupt_at_every_line",
        "kill_at_every_line",
        "remember",
        "run_and_kill",
        "run_forked",
        "stop",
        "within",
    },
}

# Words that no name may have, and what this project says instead.
NOT_OUR_WORDS = {
    "ledger": "pool state",
    "ring": "wake",
    "bell": "wake word",
    "doorbell": "wake word",
    "whoever": "owner, holder or waiter",
    "crew": "workers",
    "fleet": "processes",
    "conductor": "launcher",
    "crowd": "processes",
}

SUPPORTED_PYTHONS = ((3, 10), (3, 11), (3, 12), (3, 13), (3, 14))

COMPILE_ALL = """
import sys
for path in sys.stdin.read().split("\\0"):
    with open(path, "rb") as file:
        compile(file.read(), path, "exec")
"""


def parts(layers: tuple[tuple[str, ...], ...]) -> list[str]:
    return [part for layer in layers for part in layer]


def part_of(module: str) -> str:
    """`shmblocks.transfer.room` is of the part `transfer`."""
    _, _, inner = module.partition(".")
    return inner.split(".")[0] or "__init__"


@functools.cache
def sources() -> tuple[Path, ...]:
    """Every Python file of the project."""
    folders = (PACKAGE, ROOT / "tests", ROOT / "examples", ROOT / "scripts")
    return tuple(sorted(path for folder in folders for path in folder.rglob("*.py")))


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@functools.cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_modules(name: str, path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere: also inside functions, also for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{name} imports relatively; the parts are named in full here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of shmblocks that it imports."""
    return {
        name: {module for module in imported_modules(name, path) if module in modules()}
        for name, path in modules().items()
    }


def test_every_part_stands_in_the_table_of_layers() -> None:
    found = {part_of(name) for name in modules()}
    assert found == set(parts(LAYERS)), "the table must name each part of shmblocks, and no other"
    assert len(parts(LAYERS)) == len(set(parts(LAYERS)))


@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=lambda layer: "+".join(LAYERS[layer]))
def test_a_part_imports_only_parts_below_it(layer: int) -> None:
    below = set(parts(LAYERS[:layer]))
    wrong = [
        f"{name} imports {imported}"
        for name, found in imports().items()
        for imported in sorted(found)
        if part_of(name) in LAYERS[layer] and part_of(imported) not in below | {part_of(name)}
    ]
    assert wrong == []


def drawn_map() -> list[set[str]]:
    """The parts on each line of the map in the docstring of the package."""
    lines = re.findall(r"^ {4}(.{44})\S", shmblocks.__doc__ or "", re.MULTILINE)
    return [set(line.split()) for line in lines]


def test_the_map_in_the_docstring_draws_the_layers() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    expected = [
        {f"{part}/" if part in packages else part for part in layer}
        for layer in LAYERS
        if layer != ("__init__",)
    ]
    assert drawn_map() == expected


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module, class, function and argument that a file defines."""
    yield 1, path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def words_of(name: str) -> list[str]:
    """`_HiddenFile` and `hidden_file` are `hidden` and `file`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")


def test_no_name_has_a_word_for_which_the_project_has_another() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}: say {NOT_OUR_WORDS[word]}"
        for path in modules().values()
        for line, name in names_in(path)
        for word in words_of(name)
        if word in NOT_OUR_WORDS
    ]
    assert found == []


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter(imports()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"circle of imports: {' -> '.join(error.args[1])}")


def test_the_package_itself_only_re_exports() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    others = [
        ast.unparse(node)
        for node in tree.body
        if not isinstance(node, ast.ImportFrom)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    ]
    assert others == []


def public_names(module: ModuleType) -> set[str]:
    """`__all__`, or else the classes and functions that the module itself defines."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these(module: str) -> None:
    assert public_names(importlib.import_module(module)) == PUBLIC[module]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_class_and_function_is_documented(module: str) -> None:
    public = vars(importlib.import_module(module))
    documentable = [public[name] for name in sorted(PUBLIC[module])]
    missing = [
        each.__name__
        for each in documentable
        if (inspect.isclass(each) or inspect.isfunction(each)) and not each.__doc__
    ]
    assert missing == []


def test_importing_shmblocks_imports_neither_torch_nor_the_resource_tracker() -> None:
    program = "import sys, shmblocks; print(*sorted(sys.modules))"
    imported = run_program([sys.executable, "-c", program]).stdout.split()
    assert "shmblocks.pool" in imported
    assert not {"torch", "numpy", "rich", "multiprocessing.resource_tracker"} & set(imported)


def test_every_source_is_python_of_the_oldest_supported_version() -> None:
    for path in sources():
        ast.parse(path.read_text(), str(path), feature_version=SUPPORTED_PYTHONS[0])


@pytest.mark.parametrize("version", SUPPORTED_PYTHONS, ids=str)
def test_every_source_compiles_under_each_python_of_this_machine(version: tuple[int, int]) -> None:
    program = interpreter(version)
    if program is None:
        pytest.skip(f"no Python {version[0]}.{version[1]} on this machine")
    subprocess.run(
        [program, "-W", "error", "-c", COMPILE_ALL],
        input="\0".join(map(str, sources())),
        text=True,
        timeout=60,
        check=True,
    )


def interpreter(version: tuple[int, int]) -> str | None:
    """A Python of that version: on PATH or among those that pyenv installed."""
    name = "python{}.{}".format(*version)
    folders = [
        *os.environ["PATH"].split(os.pathsep),
        *glob.glob(os.path.expanduser(f"~/.pyenv/versions/{name.removeprefix('python')}.*/bin")),
    ]
    for candidate in (Path(folder, name) for folder in folders):
        if candidate.exists() and runs(candidate, version):
            return str(candidate)
    return None


def runs(program: Path, version: tuple[int, int]) -> bool:
    """Whether it starts and is what its name says (a pyenv shim may be neither)."""
    asked: list[str | Path] = [program, "-c", "import sys; print(*sys.version_info[:2])"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    numbers: list[str] = answer.stdout.split()
    return numbers == [str(number) for number in version]


@pytest.mark.parametrize(
    "script", ["scripts/test", "scripts/demo", "scripts/sglang", "scripts/vllm", ".ci/run"]
)
def test_a_script_can_be_started_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    run_program(["bash", "-n", ROOT / script])
