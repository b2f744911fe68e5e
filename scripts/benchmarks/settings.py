"""What a run measures. A frozen value, so that every process of a run has the same one.

Which transports it measures is said on the command line.
"""

from __future__ import annotations

import msgspec

HIDDEN = 3_584
# Tokens of the untimed messages before each timed one. Fewer than any size that is measured.
REHEARSAL_TOKENS = 32

# Tokens that one turn of a transport moves, about. More: the largest sizes with the slowest peers
# take most of the run. Fewer: they have too few samples for a median.
TURN_TOKENS = 24_000


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One run. The defaults are those of the published numbers."""

    tokens: tuple[int, ...] = (64, 512, 2_000, 8_192, 16_384)
    hidden: int = HIDDEN
    rounds: int = 10
    # Of the payloads, and of the order of turns.
    seed: int = 0
    # Untimed small messages before each timed part of a message. Fewer: after a payload of 117 MB
    # went through the caches, every step is slower than after one of 0.46 MB. More: a longer run.
    rehearsals: int = 4
    # Messages of each turn that are carried and checked, but not counted.
    warm_up: int = 1
    most_messages: int = 20
    fewest_messages: int = 3
    # Payloads of the largest size that a transport must be able to hold at once.
    depth: int = 2

    @property
    def most_tokens(self) -> int:
        return max(self.tokens)

    def messages(self, tokens: int) -> int:
        """How many messages one turn counts."""
        wanted = TURN_TOKENS // tokens if tokens else self.most_messages
        return max(self.fewest_messages, min(self.most_messages, wanted))

    def payload_bytes(self, tokens: int) -> int:
        return tokens * self.hidden * 2


# Does everything once or twice: shows that it works, not what it costs.
QUICK = Settings(tokens=(64, 512, 2_000), rounds=2, most_messages=5, fewest_messages=2)
