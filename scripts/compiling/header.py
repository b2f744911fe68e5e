"""Writes the offsets that the compiled core uses, from the Python that draws them.

python scripts/compiling/header.py            writes shmblocks/_core/layout.h

A test compares the file with `text()`: whoever changes the layout runs this again.
"""

from __future__ import annotations

import re
from pathlib import Path

from shmblocks._os import filelock, futex
from shmblocks._state import blocks, counters, layout, states

HEADER = Path(__file__).resolve().parents[2] / "shmblocks/_core/layout.h"

# What a name of layout.py must begin with to be of use to C, and names beside these.
_PREFIXES = ("H_", "R_", "L_", "C_", "M_", "Q_", "P_")
_NAMES = (
    "LAYOUT_VERSION",
    "WORD",
    "UNBOUNDED",
    "FAILED",
    "REQUEST_ID_BYTES",
    "KEY_BYTES",
    "RECORD_WORDS",
    "RECORD_HEAD_WORDS",
    "LEASE_WORDS",
    "CHANNEL_WORDS",
    "MESSAGE_WORDS",
    "MOST_MESSAGE_BYTES",
    "SPARE_SLOTS",
)


def text() -> str:
    """The header."""
    names = {name: getattr(layout, name) for name in dir(layout) if name.startswith(_PREFIXES)}
    names |= {name: getattr(layout, name) for name in _NAMES}
    names |= {f"R_{name.upper()}": at for at, name in enumerate(layout.Record._fields)}
    names |= {f"L_{name.upper()}": at for at, name in enumerate(layout.LeaseRecord._fields)}
    names["L_MESSAGE"] = layout.LEASE_HEAD.size // layout.WORD
    names["L_NUMBER"] = names["L_CHANNEL"] + layout.LEASE_CHANNEL.size // layout.WORD - 1
    names["LEASE_HEAD_WORDS"] = layout.LEASE_HEAD.size // layout.WORD
    names["HEAD_WORDS"] = layout.ALLOCATION_HEAD.size // layout.WORD
    names |= {f"STATE_{state.name}": number for state, number in states.NUMBER.items()}
    names["NUM_STATES"] = len(states.STATES)
    names |= _constants(counters.Counter, "COUNT_") | _constants(counters.Histogram, "HISTOGRAM_")
    names["BUCKETS"] = counters.BUCKETS
    names["READS"], names["WRITES"] = blocks.READS, blocks.WRITES
    names["ENTER"], names["LEAVE"] = filelock.ENTER, filelock.LEAVE
    names["LONGEST_SLEEP_NS"] = int(futex.LONGEST_SLEEP * 1e9)
    used = _words_of_the_sources()
    lines = [
        f"#define {name} {_literal(value)}" for name, value in sorted(names.items()) if name in used
    ]
    return "\n".join(
        (
            "/* Written by scripts/compiling/header.py from shmblocks/_state/layout.py and its",
            " * neighbours. Do not edit: run it again. */",
            "#ifndef SHMBLOCKS_LAYOUT_H",
            "#define SHMBLOCKS_LAYOUT_H",
            "",
            *lines,
            "",
            "#endif",
            "",
        )
    )


def _words_of_the_sources() -> set[str]:
    """What the C speaks of: a constant that it does not use is none of its business."""
    sources = [path for path in HEADER.parent.glob("*.[ch]") if path != HEADER]
    return set(re.findall(r"\w+", "".join(path.read_text() for path in sources)))


def _constants(owner: type, prefix: str) -> dict[str, int]:
    return {prefix + name: value for name, value in vars(owner).items() if isinstance(value, int)}


def _literal(value: int) -> str:
    return f"{value}ull" if value >= 1 << 31 else str(value)


if __name__ == "__main__":
    HEADER.write_text(text())
