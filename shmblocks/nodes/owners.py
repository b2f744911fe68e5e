"""Which node owns a key: a rendezvous hash over the launcher's list.

Each node of the list gets a number for the key; the largest owns it. So all processes that have the
same list (in any order) name the same owner, and a node that is added or taken away changes the
owner of its own share of the keys and of no other.

What it does not do: know who lives, or what anybody has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from shmblocks.nodes.address import Address, address_text


class Owners:
    """The owners of keys among some addresses."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        # Hashes of the names, so that each can be the key of another hash.
        self._seeds = [
            hashlib.blake2b(address_text(address).encode(), digest_size=32).digest()
            for address in addresses
        ]

    def owner_of(self, key: bytes) -> int:
        """The index of a key's owner in the list, which has at least one address."""
        scores = [hashlib.blake2b(key, digest_size=8, key=seed).digest() for seed in self._seeds]
        return scores.index(max(scores))
