"""What all parts of the plug-in share in one process: what was counted, and how failures end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

logger = logging.getLogger("shmblocks.sglang")


@dataclasses.dataclass
class Counters:
    """Since this process started. Of the encoder:

    handles        destinations that got a handle
    bytes          destinations that got bytes: because it was
      small          small
      not_attached   going to somebody who is not attached
      full           too much for the blocks that are free
      failed         anything else; the log says what

    of a rank:

    opened         handles that became a tensor
    given_back     claims of messages that SGLang dropped
    """

    handles: int = 0
    bytes: int = 0
    small: int = 0
    not_attached: int = 0
    full: int = 0
    failed: int = 0
    opened: int = 0
    given_back: int = 0

    def __str__(self) -> str:
        counts = dataclasses.asdict(self)
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "nothing"


@dataclasses.dataclass
class Process:
    """One encoder or one rank."""

    counters: Counters = dataclasses.field(default_factory=Counters)

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What fails in this context is logged and counted, and SGLang goes on as without us."""
        try:
            yield
        except Exception:
            self.counters.failed += 1
            logger.exception("shmblocks: %s", what)


process = Process()
