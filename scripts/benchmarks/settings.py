"""What a run is asked to measure. It does not say which candidates: that is the command line's.

A frozen value, so that every process of a run has the same one.
"""

from __future__ import annotations

import msgspec

TOKENS = (64, 512, 2_000, 8_192, 16_384)
QUICK_TOKENS = (64, 512, 2_000)
HIDDEN = 3_584
ALLOC_BLOCKS = (512, 8_192, 65_536, 1_048_576)

# Tokens of the untimed messages before each timed part. Fewer than any size that is measured.
REHEARSAL_TOKENS = 32
# How many of them. Fewer: after a payload of 117 MB went through the caches, every step is still
# slower than after one of 0.46 MB. More: the run takes longer.
REHEARSALS = 4

# Tokens that one turn of a candidate moves, about. More: the largest sizes with the slowest peers
# take most of the run. Fewer: they have too few samples for a median.
TURN_TOKENS = 24_000
MOST_MESSAGES = 20
FEWEST_MESSAGES = 3


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    tokens: tuple[int, ...] = TOKENS
    hidden: int = HIDDEN
    rounds: int = 10
    seed: int = 0
    # Untimed small messages through a candidate before each timed part of a message; 0: none.
    rehearsals: int = REHEARSALS
    # Messages of each turn that are carried and checked, but not counted.
    warm_up: int = 1
    most_messages: int = MOST_MESSAGES
    fewest_messages: int = FEWEST_MESSAGES
    alloc_blocks: tuple[int, ...] = ALLOC_BLOCKS
    # Pairs of alloc and free in one turn, for each size of pool.
    alloc_pairs: int = 200

    @property
    def most_tokens(self) -> int:
        return max(self.tokens)

    def messages(self, tokens: int) -> int:
        """How many messages one turn counts."""
        wanted = TURN_TOKENS // tokens if tokens else self.most_messages
        return max(self.fewest_messages, min(self.most_messages, wanted))

    def payload_bytes(self, tokens: int) -> int:
        return tokens * self.hidden * 2


def full(seed: int) -> Settings:
    """What the published numbers are made with."""
    return Settings(seed=seed)


def quick(seed: int) -> Settings:
    """Does everything once or twice: shows that it works, not what it costs."""
    return Settings(
        tokens=QUICK_TOKENS,
        rounds=2,
        seed=seed,
        most_messages=5,
        fewest_messages=2,
        alloc_pairs=50,
    )
