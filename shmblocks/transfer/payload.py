"""What the embedding side sends: tensors that it borrows, or blocks that the caller wrote itself.

    tensors             checked, borrowed until the transfer ended, copied into the pool
    reserved blocks     `pool.alloc`, written with `out=`: the payload owns them from then on. Push
                        publishes them as they are; landing copies out of them
    published blocks    `pool.publish(readers=n)`, for several receivers: stay the caller's, who
                        frees them if one of the transfers fails. Push only

What it does not do: allocate, or know how far the transfer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shmblocks.config import Field
from shmblocks.errors import InvalidStateError
from shmblocks.handle import BlockHandle
from shmblocks.transfer.tensors import (
    AUX_LENGTH,
    AUX_MROPE_DELTA,
    AUX_SIZE,
    Tensors,
    copy_tokens,
    count_tokens,
)

if TYPE_CHECKING:
    import torch

    from shmblocks.pool import BlockPool
    from shmblocks.view import BlockView

INT32_MAX = (1 << 31) - 1


class Payload:
    """`blocks` is None for tensors; `is_shared` marks published blocks, which stay the caller's."""

    def __init__(
        self,
        fields: Sequence[Field],
        num_tokens: int,
        tensors: Tensors,
        aux: torch.Tensor,
        blocks: BlockHandle | None = None,
        is_shared: bool = False,
    ) -> None:
        self.num_tokens = num_tokens
        self.token_bytes = sum(field.token_bytes for field in fields)
        self.blocks = blocks
        self.is_shared = is_shared
        self._fields = fields
        self._tensors = tensors
        self._aux = aux

    def write(self, view: BlockView, offset: int, first_token: int, num_tokens: int) -> None:
        """Copy tokens `first_token ..` into the blocks, from token `offset` of them on, and the
        aux."""
        copy_tokens(self._fields, view, offset, self._tensors, first_token, num_tokens)
        view.aux.copy_(self._aux)

    def forget(self) -> None:
        """Let go of the tensors: the transfer has ended."""
        self._tensors = {}


def payload_of_tensors(pool: BlockPool, tensors: Tensors, mrope_position_delta: int) -> Payload:
    """A payload that copies; errors say which field is not as the pool wants it."""
    import torch

    fields = pool.config.fields
    num_tokens = count_tokens(fields, tensors)
    if num_tokens > INT32_MAX:
        raise ValueError(f"tensors: expected at most {INT32_MAX} tokens, got {num_tokens}")
    aux = torch.zeros(AUX_SIZE, dtype=torch.int32)
    aux[AUX_LENGTH] = num_tokens
    aux[AUX_MROPE_DELTA] = checked_delta(mrope_position_delta)
    return Payload(fields, num_tokens, dict(tensors), aux)


def payload_of_blocks(pool: BlockPool, handle: BlockHandle, delta: int | None) -> Payload:
    """A payload of a reservation of this process. `aux[0]` is set here, `aux[1]` if it is given."""
    view = pool.view(handle)
    view.aux[AUX_LENGTH] = handle.num_tokens
    if delta is not None:
        view.aux[AUX_MROPE_DELTA] = checked_delta(delta)
    tensors = {field.name: view[field.name] for field in pool.config.fields}
    return Payload(pool.config.fields, handle.num_tokens, tensors, view.aux, blocks=handle)


def payload_of_published(pool: BlockPool, handle: BlockHandle) -> Payload:
    """A payload of blocks that the caller published, and whose aux it wrote before."""
    if handle.is_fake or handle.pool_id != pool.pool_id:
        raise InvalidStateError(f"{handle}: expected published blocks of pool {pool.name}")
    fields = pool.config.fields
    return Payload(fields, handle.num_tokens, {}, _no_aux(), blocks=handle, is_shared=True)


def checked_delta(delta: int) -> int:
    """A mrope position delta that fits into aux."""
    if not -INT32_MAX - 1 <= delta <= INT32_MAX:
        raise ValueError(f"mrope_position_delta: expected an int32, got {delta}")
    return delta


def _no_aux() -> torch.Tensor:
    import torch

    return torch.zeros(AUX_SIZE, dtype=torch.int32)
