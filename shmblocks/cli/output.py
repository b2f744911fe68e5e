"""Where output goes: JSON for machines, colours for terminals, plain text for everything else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import TextIO

import msgspec

from shmblocks.cli import plain
from shmblocks.cli.document import Document, harmless


def width() -> int:
    """Columns of the terminal (or of `COLUMNS`); 80 where there is none."""
    return shutil.get_terminal_size().columns


def is_pretty(file: TextIO) -> bool:
    """Whether `rich` will draw: on a terminal, where it is installed."""
    return file.isatty() and importlib.util.find_spec("rich") is not None


def write_document(document: Document, file: TextIO) -> None:
    """Show a document to a person."""
    if is_pretty(file):
        from shmblocks.cli import pretty

        pretty.write(document, file)
    else:
        write_text(plain.render(document), file)


def write_json(report: msgspec.Struct, file: TextIO) -> None:
    """One JSON document, indented, keys in the order that the command's help gives."""
    encoded = msgspec.json.encode(report)
    write_text(msgspec.json.format(encoded, indent=2).decode() + "\n", file)


def write_error(text: str, file: TextIO) -> None:
    """One line, whatever the message brought along."""
    write_text(f"shmblocks: {harmless(' '.join(text.split()))}\n", file)


def write_text(text: str, file: TextIO) -> None:
    """Letters that the terminal's encoding lacks are written as escapes instead of failing."""
    encoding = file.encoding or "utf-8"
    file.write(text.encode(encoding, "backslashreplace").decode(encoding))


def silence_stdout() -> None:
    """After a broken pipe: give the interpreter's last flush at exit somewhere to go."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
