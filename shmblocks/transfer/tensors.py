"""Tokens of every field: checking what a user hands over, and copying between memories.

A field of shape `s` is `[tokens, *s]`; a transposed one (shape `(k,)`) is `[k, tokens]`, for the
user as in a pool's view. Only `token_dim` and `full_shape` know which.

What it does not do: allocate blocks, or know what a room is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shmblocks.config import DTYPES, Field

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]
Fields = Sequence[Field]

AUX_LENGTH = 0  # aux[0]: total length in tokens
AUX_MROPE_DELTA = 1  # aux[1]: mrope position delta
AUX_SIZE = 16


def token_dim(field: Field) -> int:
    """The dimension that counts tokens."""
    return 1 if field.transposed else 0


def full_shape(field: Field, num_tokens: int) -> tuple[int, ...]:
    """The shape of the field for so many tokens."""
    return (*field.shape, num_tokens) if field.transposed else (num_tokens, *field.shape)


def torch_dtype(field: Field) -> torch.dtype:
    """The field's dtype."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[field.dtype][1])
    return dtype


def count_tokens(fields: Fields, tensors: Tensors) -> int:
    """How many tokens the tensors hold; TypeError or ValueError if they don't fit the fields."""
    _check_names([field.name for field in fields], list(tensors))
    lengths = {field.name: _check_tensor(field, tensors[field.name]) for field in fields}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"tensors: expected the same number of tokens in every field, got {lengths}"
        )
    num_tokens = next(iter(lengths.values()))
    if num_tokens < 1:
        raise ValueError("tensors: expected at least one token, got 0")
    return num_tokens


def _check_names(expected: list[str], got: list[str]) -> None:
    missing = [name for name in expected if name not in got]
    unknown = [name for name in got if name not in expected]
    if missing or unknown:
        raise ValueError(
            f"tensors: expected the pool's fields {', '.join(expected)}, got "
            f"{', '.join(got) or 'none'} (missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(unknown) or 'none'})"
        )


def _check_tensor(field: Field, tensor: torch.Tensor) -> int:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{field.name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch_dtype(field):
        raise TypeError(f"{field.name}: expected {torch_dtype(field)}, got {tensor.dtype}")
    dim = token_dim(field)
    length = tensor.shape[dim] if tensor.dim() > dim else -1
    if tuple(tensor.shape) != full_shape(field, length):
        sizes = [str(size) for size in full_shape(field, -1)]
        sizes[dim] = "tokens"
        raise ValueError(
            f"{field.name}: expected the shape [{', '.join(sizes)}], got {list(tensor.shape)}"
        )
    return length


def copy_tokens(
    fields: Fields,
    target: Tensors,
    target_token: int,
    source: Tensors,
    source_token: int,
    num_tokens: int,
) -> None:
    """Copy `num_tokens` tokens of every field, from `source_token` on to `target_token` on."""
    for field in fields:
        dim = token_dim(field)
        into = target[field.name].narrow(dim, target_token, num_tokens)
        into.copy_(source[field.name].detach().narrow(dim, source_token, num_tokens))


def first_tokens(fields: Fields, tensors: Tensors, num_tokens: int) -> Tensors:
    """The first tokens of every field, without a copy."""
    return {
        field.name: tensors[field.name].narrow(token_dim(field), 0, num_tokens) for field in fields
    }


def finish_copies(tensors: Tensors) -> None:
    """Wait for the copies into or out of the tensors on this thread's current stream.

    Needed before a message tells another process of the memory, or offers it again: in a CUDA pool
    the other process's streams do not wait for ours. In host memory a copy is done when it returns.
    """
    import torch

    device = next(iter(tensors.values())).device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class PrivateTokens:
    """Memory of this process for all tokens of a transfer, laid out as in a pool and filled from
    the front."""

    def __init__(self, fields: Fields, device: torch.device, total_tokens: int) -> None:
        import torch

        self._fields = fields
        self.tensors: dict[str, torch.Tensor] = {}
        self.filled = 0
        for field in fields:
            shape = (total_tokens, *field.shape)
            stored = torch.empty(shape, dtype=torch_dtype(field), device=device)
            self.tensors[field.name] = stored.t() if field.transposed else stored

    def append(self, source: Tensors, source_token: int, num_tokens: int) -> None:
        """Copy the next tokens in."""
        copy_tokens(self._fields, self.tensors, self.filled, source, source_token, num_tokens)
        self.filled += num_tokens
