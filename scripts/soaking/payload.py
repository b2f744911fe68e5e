"""What the soak writes and checks: every row says whose it is.

A row is int64[4]: (tag, generation, row number, tag ^ generation ^ row number). A row that is
another's, stale, torn or shifted is told apart from the one that should be there.
"""

from __future__ import annotations

import torch

from shmblocks import Field

FIELDS = (Field("rows", (4,), "int64"), Field("marks", (), "int32"))


def rows(tag: int, generation: int, num_tokens: int) -> torch.Tensor:
    """int64 [num_tokens, 4]."""
    numbers = torch.arange(num_tokens, dtype=torch.int64)
    tags = torch.full_like(numbers, tag)
    generations = torch.full_like(numbers, generation)
    return torch.stack([tags, generations, numbers, tags ^ generations ^ numbers], dim=1)


def marks(tag: int, num_tokens: int) -> torch.Tensor:
    """int32 [num_tokens]."""
    return torch.full((num_tokens,), tag & 0x7FFFFFFF, dtype=torch.int32)


def wrong(
    got: torch.Tensor, got_marks: torch.Tensor, tag: int, generation: int, num_tokens: int
) -> str | None:
    """What is wrong with a payload; None when it is right."""
    if tuple(got.shape) != (num_tokens, 4):
        return f"expected {num_tokens} rows, got the shape {tuple(got.shape)}"
    expected = rows(tag, generation, num_tokens)
    if not torch.equal(got, expected):
        first = int((got != expected).any(dim=1).nonzero()[0])
        return f"row {first}: expected {expected[first].tolist()}, got {got[first].tolist()}"
    if not torch.equal(got_marks, marks(tag, num_tokens)):
        return f"the marks of tag {tag} are not there"
    return None
