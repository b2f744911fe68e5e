"""Token ids without a downloaded tokenizer: text is its UTF-8 bytes, one token each.

The models have learned nothing, so which ids a word has does not matter; that the special tokens
are where the model's code expects them does. Their order is that of Qwen's vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable


class Tokens:
    """The special ids of a vocabulary, and text to and from ids."""

    def __init__(self, special: int) -> None:
        """`special`: the first special id, 151643 in Qwen's vocabulary."""
        self.end_of_text = special
        self.im_start = special + 1
        self.im_end = special + 2
        self.vision_start = special + 9
        self.vision_end = special + 10
        self.image = special + 12
        self.video = special + 13

    def encode(self, text: str) -> list[int]:
        """Text to ids, one per UTF-8 byte."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text: visible ASCII as it is, every other id as <id>."""
        return "".join(chr(i) if 32 <= i < 127 else f"<{i}>" for i in ids)

    @property
    def visual(self) -> tuple[int, int]:
        """The ids that embeddings of the vision tower replace."""
        return self.image, self.video
