"""Sizes and counts as people read them, written alike in errors and in every output."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_text(size: int) -> str:
    """`1536` -> `1.5 KiB`. Cut, not rounded up: 'has 1 GiB free' is never a little less."""
    value, unit = size, 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value >>= 10
        unit += 1
    tenths = size * 10 // (1 << (10 * unit)) % 10 if unit and value < 100 else 0
    return f"{value}.{tenths} {_UNITS[unit]}" if tenths else f"{value} {_UNITS[unit]}"


def count_text(count: int, one: str, many: str = "") -> str:
    """`1 pool`, `2 pools`, `2 processes` (with `many` given)."""
    return f"{count} {one}" if count == 1 else f"{count} {many or one + 's'}"
