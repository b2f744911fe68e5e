"""What launch.py prints: one row per request, with a progress bar where `rich` and a terminal are.

It formats and prints. It measures nothing and decides nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from _processes import Answer, Answered, Encoded, Job

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

HEADER = (
    "room  photograph    pixels     tokens  blocks  rounds    MiB  way      to"
    "  encode ms  handoff ms  same  first tokens"
)


@dataclass(frozen=True)
class Row:
    """One finished request."""

    job: Job
    encoded: Encoded
    answered: Answered
    expected: Answer

    @property
    def is_same(self) -> bool:
        """Whether bytes and tokens are those of the one-process run."""
        return self.answered.answer == self.expected

    @property
    def handoff_ms(self) -> float:
        """From the moment the embedding process has the prompt's tensors in its own memory, until
        the language process holds the embeddings as a tensor over the pool.

        So it has in it: rounding to bf16 and writing into the pool; every message in both
        directions, the resume's too when the landing allocation was too small; and the waking of
        the other process, on whatever processors there are. Not in it: either model's computing, as
        long as encoding takes longer than asking does: a language process has one request at a
        time, and gets it before the embedding process does.
        """
        return (self.answered.holding_ns - self.encoded.ready_ns) / 1e6

    def __str__(self) -> str:
        photo, got = self.job.photo, self.answered
        size = f"{photo.width}x{photo.height}"
        first = " ".join(str(token) for token in got.answer.tokens[:4])
        return (
            f"{self.job.room:4}  {photo.name:12}  {size:9}  {got.num_tokens:6}  {got.num_blocks:6}"
            f"  {got.rounds:6}  {got.num_bytes / 2**20:5.2f}  {self.job.way:7}  L{self.job.reader}"
            f"  {self.encoded.encode_ms:9.0f}  {self.handoff_ms:10.2f}"
            f"  {'yes ' if self.is_same else 'NO  '}  {first} ..."
        )


class Report:
    """Plain lines, for files and pipes. A context manager, since a progress bar has an end."""

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    def row(self, row: Row) -> None:
        """Print a row; that is one step."""
        self.say(str(row))
        self.step()

    def stage(self, what: str, steps: int) -> None:
        """Begin something of so many steps."""
        self.say(f"{what} ({steps}) ...")

    def step(self) -> None:
        """One of them is done."""

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class RichReport(Report):
    """The same lines above a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def row(self, row: Row) -> None:
        style = "green" if row.is_same else "bold red"
        self._progress.console.print(str(row), style=style, highlight=False, soft_wrap=True)
        self.step()

    def stage(self, what: str, steps: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=steps)

    def step(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def make_report() -> Report:
    """A progress bar in a terminal, if `rich` is there; plain lines otherwise."""
    if not sys.stdout.isatty():
        return Report()
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError:
        return Report()
    return RichReport(
        Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            transient=True,
        )
    )
