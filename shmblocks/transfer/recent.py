"""What was seen lately, bounded in number and time.

Late messages are told from new ones by it, and it must not grow with the life of a process. What it
does not do: keep anything alive that somebody needs.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A dict that forgets its oldest entries."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._entries: OrderedDict[K, tuple[V, float]] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return self.get(key) is not None

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: K, value: V) -> None:
        """Remember, as the newest."""
        self._entries.pop(key, None)
        self._entries[key] = (value, time.monotonic() + self._seconds)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def get(self, key: K) -> V | None:
        """The value, when it is not too old."""
        entry = self._entries.get(key)
        return entry[0] if entry is not None and time.monotonic() < entry[1] else None

    def pop(self, key: K) -> V | None:
        """The value, when it is not too old; it is forgotten."""
        value = self.get(key)
        self._entries.pop(key, None)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
