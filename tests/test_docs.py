"""Every Python block of the documents passes `mypy --strict`, and every program in them runs.

    ```python title="encoder.py"     a program. Blocks of one section with the same title are one
                                     program; the programs of one section run at the same time, and
                                     print what the comments behind their `print` calls say
    ```python                        a fragment: it may use the names of `GIVEN`, and `await`

A section begins at a heading of the second level. Types are checked at the lines where the blocks
stand, so that mypy names the line of the page.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import shmblocks.nodes
import shmblocks.transfer
from shmblocks.cli.main import COMMANDS
from tests.test_project import PUBLIC, public_names

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted(DOCS.rglob("*.md")),
)

# How long a program of a page may take. Smaller: importing torch on a loaded machine is called a
# hang. Larger: a real hang costs that much.
PATIENCE = 100.0

# Pages name pools of a useful size; a test needs a small one.
SMALLER = {"65_536": "4_096"}

IMPORTS = f"""\
import asyncio
import torch
from shmblocks import {", ".join(shmblocks.__all__)}
from shmblocks.nodes import {", ".join(shmblocks.nodes.__all__)}
from shmblocks.transfer import {", ".join(shmblocks.transfer.__all__)}
"""
GIVEN = (
    "pool: BlockPool",
    "host_pool: BlockPool",
    "queue: HandleQueue[BlockHandle]",
    "tx: HandleQueue[bytes]",
    "rx: HandleQueue[bytes]",
    "config: PoolConfig",
    "handle: BlockHandle",
    "key: bytes",
    "lease: Lease",
    "embeddings: torch.Tensor",
    "endpoint: EmbeddingEndpoint",
    "node1: RemotePool",
)


class Block(NamedTuple):
    """One Python block of a page."""

    page: Path
    section: str
    line: int
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Program(NamedTuple):
    """The blocks of one section with one title."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def text(self) -> str:
        """With each line at its number in the page."""
        lines: list[str] = []
        for block in self.blocks:
            lines += [""] * (block.line - len(lines))
            lines += block.text.splitlines()
        return "\n".join(lines) + "\n"


def blocks_of(page: Path) -> Iterator[Block]:
    section, opened, lines = "", None, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if opened is not None:
            if line.startswith("```"):
                title, first = opened
                yield Block(page, section, first, title, "\n".join(lines))
                opened = None
            else:
                lines.append(line)
        elif line.startswith("## "):
            section = line[3:]
        elif line.startswith("```python"):
            found = re.fullmatch(r'```python(?: title="([\w.]+)")?', line)
            assert found is not None, f"{page}:{number}: expected ```python title=..., got {line}"
            opened, lines = (found[1] or "", number), []
    assert opened is None, f"{page}: a block is not closed"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SECTIONS = list(dict.fromkeys((block.page, block.section) for block in BLOCKS if block.title))


def programs_of(page: Path, section: str) -> list[Program]:
    """The programs of a section, in the order in which they begin."""
    titled: dict[str, list[Block]] = {}
    for block in BLOCKS:
        if block.title and (block.page, block.section) == (page, section):
            titled.setdefault(block.title, []).append(block)
    return [Program(title, tuple(blocks)) for title, blocks in titled.items()]


def fragment(block: Block) -> str:
    """A function around the block, which mypy reports with the line of the page."""
    body = "\n".join(f"    {line}" if line else "" for line in block.text.splitlines())
    head = f"{IMPORTS}async def fragment({', '.join(GIVEN)}) -> None:\n"
    # Pages are longer than the head; a block near the top of one is reported some lines too low.
    return "\n" * max(0, block.line - head.count("\n")) + head + body + "\n"


def test_every_python_block_passes_mypy_strict(tmp_path: Path) -> None:
    sources: dict[Path, str] = {}
    for page, section in SECTIONS:
        for program in programs_of(page, section):
            sources[tmp_path / module_name(program.blocks[0])] = program.text
    for block in BLOCKS:
        if not block.title:
            sources[tmp_path / module_name(block)] = fragment(block)
    for path, text in sources.items():
        path.write_text(text)
    # The cache of `scripts/test`, which has checked the package just before.
    options = ["--strict", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *map(str, sources)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (checked.stdout, checked.stderr) == ("", "")


def module_name(block: Block) -> str:
    """A file name that says where the block stands."""
    words = re.sub(r"\W+", "_", str(block.page.relative_to(ROOT).with_suffix("")))
    return f"{words}_line_{block.line}.py"


@pytest.mark.watchdog(2 * PATIENCE)
@pytest.mark.parametrize(
    ("page", "section"),
    [pytest.param(*each, id=f"{each[0].stem}: {each[1]}") for each in SECTIONS],
)
def test_the_programs_of_a_section_run_together(
    page: Path, section: str, pool_name: str, tmp_path: Path
) -> None:
    programs = programs_of(page, section)
    running = []
    for program in programs:
        path = tmp_path / program.title
        path.write_text(on_its_own(program.text, pool_name))
        running.append(
            subprocess.Popen(
                [sys.executable, "-W", "error::ResourceWarning", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    # The last first: it reads what the others keep open until they are told to go on.
    results = {}
    try:
        for program, process in reversed(list(zip(programs, running, strict=True))):
            printed, errors = process.communicate("\n", timeout=PATIENCE)
            for prompt in re.findall(r'input\("(.*?)"\)', program.text):
                printed = printed.replace(prompt, "", 1)
            results[program.title] = (process.returncode, printed.splitlines(), errors)
    finally:
        for process in running:
            process.kill()
            process.wait()
    wanted = {program.title: (0, what_it_prints(program.text), "") for program in programs}
    assert results == wanted


def on_its_own(text: str, prefix: str) -> str:
    """The program with pools and queues of names that nobody else uses, and smaller ones."""
    made = re.findall(r'\.(?:create|attach|ensure|attach_async)\(\s*"([\w.-]+)"', text)
    for name in dict.fromkeys(made):
        text = text.replace(f'"{name}"', f'"{prefix}-{name}"')
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


def what_it_prints(text: str) -> list[str]:
    return re.findall(r"^ *print\(.*\)  # (.*)$", text, re.MULTILINE)


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    names = public_names(importlib.import_module(module))
    if module == "shmblocks":
        # Page by page, in an order that can be read; the errors are a page of their own.
        assert "shmblocks.errors" in shown
        missing = {name for name in names if f"{module}.{name}" not in shown}
        assert {name for name in missing if not name.endswith("Error")} == set()
    else:
        assert module in shown, "one page shows all of it"


# ---- links and commands --------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)(?:#[\w-]+)?\)", page.read_text())
    # The pages of the reference are made by `scripts/docs`, which checks anchors too.
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_every_page_stands_in_the_table_of_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"^\s+- [^:\n]+: (\S+\.md)$", contents, re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_every_script_and_command_that_a_page_shows_is_there() -> None:
    for page in PAGES:
        shell = "\n".join(
            re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        )
        for script in re.findall(r"(?:^|\s)(scripts/[\w-]+)", shell):
            assert os.access(ROOT / script, os.X_OK), f"{page}: {script}"
        shown = set(re.findall(r"^(?:\$ )?shmblocks ([a-z]+)", shell, re.MULTILINE))
        assert shown <= COMMANDS.keys(), page


# ---- the version ---------------------------------------------------------------------------------


def test_the_version_is_that_of_the_changelog() -> None:
    """Between two releases it is the next one's, `.dev0`; a release has nothing unreleased."""
    project = (ROOT / "pyproject.toml").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    headings = re.findall(r"^## (.+)$", changes, re.MULTILINE)
    released = [heading.split(" - ") for heading in headings if heading != "Unreleased"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in released)
    if headings[0] == "Unreleased":
        assert version.endswith(".dev0")
        assert version.removesuffix(".dev0") not in [number for number, _ in released]
    else:
        assert version == released[0][0]
