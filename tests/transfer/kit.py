"""What the tests of transfers share: sizes, payloads, and what must hold when all is over.

torch is imported inside functions, because every worker collects every test.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from shmblocks import BlockPool, Field, PoolConfig, multimodal_fields
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, TransferResult
from shmblocks.transfer.messages import AnyMessage, decode, encode

if TYPE_CHECKING:
    import torch

BLOCK = 16  # tokens
TOTAL_BLOCKS = 64
LANDING_BLOCKS = 4
LANDING = LANDING_BLOCKS * BLOCK  # tokens
WHOLE_POOL = TOTAL_BLOCKS * BLOCK  # tokens
# Seconds until a wait of a test counts as a hang. Smaller: a loaded machine is called a hang.
PATIENCE = 20.0

Mode = Literal["landing", "push"]
MODES: tuple[Mode, ...] = ("landing", "push")


def config(total_blocks: int = TOTAL_BLOCKS, fields: tuple[Field, ...] | None = None) -> PoolConfig:
    return PoolConfig(
        total_tokens=total_blocks * BLOCK,
        fields=multimodal_fields(8, num_deepstack=2) if fields is None else fields,
        block_size=BLOCK,
        default_num_blocks=LANDING_BLOCKS,
    )


def payload(fields: Sequence[Field], num_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random bits (NaNs among them) for every field."""
    import torch

    from shmblocks.transfer.tensors import torch_dtype

    generator = torch.Generator().manual_seed(1_000_003 * seed + num_tokens)
    made = {}
    for field in fields:
        size = num_tokens * field.token_bytes
        high = 2 if field.dtype == "bool" else 256  # other bytes are no bool
        bits = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
        tensor = bits.view(torch_dtype(field)).view(num_tokens, *field.shape)
        made[field.name] = tensor.t() if field.transposed else tensor
    return made


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    import torch

    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = [each.contiguous().view(-1).view(torch.uint8) for each in (left, right)]
    return torch.equal(flat[0], flat[1])


def assert_arrived(
    result: TransferResult, pool: BlockPool, num_tokens: int, seed: int = 0, delta: int = 0
) -> None:
    """The result is that payload, bit for bit."""
    sent = payload(pool.config.fields, num_tokens, seed)
    assert result.num_tokens == num_tokens
    assert list(result) == [field.name for field in pool.config.fields]
    for name, tensor in sent.items():
        assert same_bits(result[name], tensor), f"{name} of {num_tokens} tokens differs"
    assert result.num_bytes == num_tokens * pool.config.token_bytes
    assert result.mrope_position_delta == delta
    assert result.aux.tolist() == [num_tokens, delta] + [0] * 14


def assert_nothing_held(pool: BlockPool) -> None:
    """The accounting equation at rest: everything is free, and nothing is wrong."""
    assert pool.allocations() == []
    assert pool.available_blocks() == pool.config.total_blocks
    assert pool.check() == []


def poll_until(
    condition: Callable[[], bool], *endpoints: EmbeddingEndpoint | LanguageEndpoint
) -> None:
    """Poll the endpoints in turn until it is so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        for endpoint in endpoints:
            endpoint.poll()
        assert time.monotonic() < deadline, f"hangs: {endpoints}"


def settle(*endpoints: EmbeddingEndpoint | LanguageEndpoint) -> None:
    """Poll until nobody has anything to say any more (for queues of this process)."""
    before: list[int] = []
    while before != (now := [each.stats().sent + each.stats().received for each in endpoints]):
        before = now
        for endpoint in endpoints:
            endpoint.poll()


def send_the_rest(endpoint: EmbeddingEndpoint | LanguageEndpoint) -> None:
    """Poll until its bounded queue has taken everything."""
    poll_until(lambda: endpoint.stats().unsent == 0, endpoint)


def intercept(messages: queue.SimpleQueue[bytes]) -> list[AnyMessage]:
    """Take what was sent, before it is read."""
    taken = [decode(messages.get_nowait()) for _ in range(messages.qsize())]
    assert None not in taken
    return [message for message in taken if message is not None]


def put(messages: queue.SimpleQueue[bytes], *sent: AnyMessage) -> None:
    for message in sent:
        messages.put(encode(message))


def peek(messages: queue.SimpleQueue[bytes]) -> list[AnyMessage]:
    """Look at what was sent, before it is read."""
    seen = intercept(messages)
    put(messages, *seen)
    return seen
