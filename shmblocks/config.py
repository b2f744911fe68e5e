"""What a pool holds: its fields and its sizes, fixed at creation.

The config is written, msgspec-encoded, into the segment's header, so that attaching needs only the
name. Reading it back is reading untrusted bytes: every rule below is checked again then.

It does not import torch: dtypes are the short names that users write (`bf16`), and only a view
turns them into `torch.dtype`.
"""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch

# Bytes per element, and the name of the `torch.dtype`.
DTYPES: dict[str, tuple[int, str]] = {
    "bf16": (2, "bfloat16"),
    "fp16": (2, "float16"),
    "fp32": (4, "float32"),
    "fp8_e4m3": (1, "float8_e4m3fn"),
    "fp8_e5m2": (1, "float8_e5m2"),
    "uint8": (1, "uint8"),
    "int8": (1, "int8"),
    "int16": (2, "int16"),
    "uint16": (2, "uint16"),
    "int32": (4, "int32"),
    "uint32": (4, "uint32"),
    "int64": (8, "int64"),
    "uint64": (8, "uint64"),
    "fp64": (8, "float64"),
    "bool": (1, "bool"),
}

BLOCK_SIZE_ENV = "SGLANG_MULTIMODAL_BLOCK_SIZE"
DEFAULT_BLOCKS_ENV = "SGLANG_DEFAULT_MULTIMODAL_BLOCKS"

# Blocks per pool. 2**24 blocks of 128 tokens are 2 billion tokens; the bound keeps every size
# computed from an untrusted header inside 64 bits.
MAX_BLOCKS = 1 << 24
MAX_BLOCK_SIZE = 1 << 20
# Smaller: fewer processes can attach. Larger: each check for the dead asks the kernel more often
# (about 1 us a place).
MAX_PARTICIPANTS = 1024
# Smaller: fewer readers at once. Larger: finding the leases of one allocation takes longer.
MAX_LEASES = 1 << 16
# Smaller: fewer threads and coroutines can wait at once. Larger: each poll searches a longer queue.
MAX_WAITERS = 1 << 14
MAX_CHANNELS = 256
MAX_CHANNEL_SLOTS = 1 << 20
MAX_CLAIMS = 1 << 14
# Of every element a field has per token, in bytes; a bound for untrusted headers again.
MAX_TOKEN_BYTES = 1 << 26
# 31 years; nanoseconds since boot plus this many still fit a word.
MAX_SECONDS = 1e9

_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,3}")


def dtype_name(dtype: str | torch.dtype) -> str:
    """The short name of a dtype (`torch.bfloat16` -> `"bf16"`); ValueError if not supported."""
    text = str(dtype).removeprefix("torch.")
    for name, (_, torch_name) in DTYPES.items():
        if text in (name, torch_name):
            return name
    raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {text!r}")


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One named tensor region of a pool: `[total_tokens, *shape]` of `dtype`.

    `transposed` (only for a one-dimensional `shape` `(k,)`) stores `[tokens, k]`, so that a chunk
    of tokens stays one contiguous slice, and shows `[k, tokens]`, as mrope positions are used.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "bf16"
    transposed: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or len(self.name) > 64:
            raise ValueError(
                f"field name: expected an identifier of at most 64 letters, got {self.name!r}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype of field {self.name}: expected one of {', '.join(DTYPES)}, "
                f"got {self.dtype!r}"
            )
        if len(self.shape) > 8 or any(size < 1 for size in self.shape):
            raise ValueError(
                f"shape of field {self.name}: expected up to 8 sizes of at least 1, "
                f"got {self.shape}"
            )
        if self.token_bytes > MAX_TOKEN_BYTES:
            raise ValueError(
                f"field {self.name}: {self.token_bytes} bytes per token are more than the "
                f"{MAX_TOKEN_BYTES} that a pool supports"
            )
        if self.transposed and len(self.shape) != 1:
            raise ValueError(
                f"field {self.name}: only a field of one dimension per token can be transposed, "
                f"got the shape {self.shape}"
            )

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...] = (),
        dtype: str | torch.dtype = "bf16",
        transposed: bool = False,
    ) -> Field:
        """Like the constructor, and takes a `torch.dtype` too."""
        return cls(name, tuple(shape), dtype_name(dtype), transposed)

    @property
    def elements(self) -> int:
        """Elements per token."""
        return math.prod(self.shape)

    @property
    def token_bytes(self) -> int:
        """Bytes per token."""
        return self.elements * DTYPES[self.dtype][0]


def multimodal_fields(
    hidden_size: int,
    num_deepstack: int = 0,
    mrope: bool = True,
    dtype: str | torch.dtype = "bf16",
) -> tuple[Field, ...]:
    """The usual fields of a multimodal model.

    `input_embeddings [hidden_size]`, `fill_ids int32`, `mrope_positions int32 [3]` (shown as
    `[3, tokens]`) and, when `num_deepstack` > 0 (Qwen3-VL),
    `deepstack_embeddings [num_deepstack * hidden_size]`.
    """
    fields = [Field.of("input_embeddings", (hidden_size,), dtype), Field("fill_ids", (), "int32")]
    if mrope:
        fields.append(Field("mrope_positions", (3,), "int32", transposed=True))
    if num_deepstack:
        fields.append(Field.of("deepstack_embeddings", (num_deepstack * hidden_size,), dtype))
    return tuple(fields)


def default_block_size() -> int:
    """Tokens per block: `SGLANG_MULTIMODAL_BLOCK_SIZE`, or 128."""
    return _from_environment(BLOCK_SIZE_ENV, 128)


def default_default_num_blocks() -> int:
    """Blocks of a landing allocation: `SGLANG_DEFAULT_MULTIMODAL_BLOCKS`, or 8."""
    return _from_environment(DEFAULT_BLOCKS_ENV, 8)


def _from_environment(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"environment variable {variable}: expected a whole number >= 1, got {text!r}"
        )
    return int(text)


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is fixed when a pool is created.

    total_tokens        tokens of the whole pool; a multiple of `block_size`
    fields              the tensor regions; `aux` (int32[16] per block) is always there
    block_size          tokens per block
    default_num_blocks  blocks of `alloc_default` (recommended: 4 for small images, 8, 16 for large)
    max_participants    processes that can be attached at once
    max_leases          leases that can be open at once, over all allocations
    unclaimed_timeout   seconds after which published blocks that nobody opened are reclaimed
    lock_timeout        seconds to wait for the pool's lock before `PoolTimeoutError`
    stream_timeout      seconds that a CPU waits for a CUDA stream before `PoolTimeoutError`
    max_waiters         threads and coroutines that can wait for blocks at once, over all processes
    channels            message channels that the pool has room for
    channel_slots       message slots of all channels together; one of capacity n takes n + 16
    max_claims          keys that can be claimed (being encoded) at once
    device              where the fields lie: `cpu` (shared memory) or `cuda:N`, as the creator
                        counts its devices
    group               name of the Unix group that may use the pool too (mode 0660); None: 0600
    """

    total_tokens: int
    fields: tuple[Field, ...] = ()
    block_size: int = msgspec.field(default_factory=default_block_size)
    default_num_blocks: int = msgspec.field(default_factory=default_default_num_blocks)
    max_participants: int = 64
    max_leases: int = 1024
    unclaimed_timeout: float = 300.0
    lock_timeout: float = 30.0
    stream_timeout: float = 300.0
    max_waiters: int = 1024
    channels: int = 8
    channel_slots: int = 8 * (1024 + 16)
    max_claims: int = 256
    group: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        _in_range("block_size", self.block_size, MAX_BLOCK_SIZE)
        if self.total_tokens < 1 or self.total_tokens % self.block_size:
            raise ValueError(
                f"total_tokens: expected a multiple of block_size ({self.block_size}), "
                f"got {self.total_tokens}"
            )
        _in_range("total_tokens / block_size", self.total_blocks, MAX_BLOCKS)
        _in_range("default_num_blocks", self.default_num_blocks, MAX_BLOCKS)
        _in_range("max_participants", self.max_participants, MAX_PARTICIPANTS)
        _in_range("max_leases", self.max_leases, MAX_LEASES)
        _positive_seconds("unclaimed_timeout", self.unclaimed_timeout)
        _positive_seconds("lock_timeout", self.lock_timeout)
        _positive_seconds("stream_timeout", self.stream_timeout)
        _in_range("max_waiters", self.max_waiters, MAX_WAITERS)
        _in_range("channels", self.channels, MAX_CHANNELS)
        _in_range("channel_slots", self.channel_slots, MAX_CHANNEL_SLOTS)
        _in_range("max_claims", self.max_claims, MAX_CLAIMS)
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device: expected 'cpu' or 'cuda:N', got {self.device!r}")
        names = [field.name for field in self.fields]
        if len(names) > 64 or len(set(names)) != len(names) or "aux" in names:
            raise ValueError(
                f"fields: expected up to 64 different names other than 'aux', got {names}"
            )

    @property
    def total_blocks(self) -> int:
        return self.total_tokens // self.block_size

    @property
    def is_on_gpu(self) -> bool:
        """Whether the fields lie in CUDA memory."""
        return self.device != "cpu"

    @property
    def token_bytes(self) -> int:
        """Bytes per token over all fields."""
        return sum(field.token_bytes for field in self.fields)

    def difference_to(self, other: PoolConfig) -> str:
        """What differs, for messages; empty when both are the same."""
        return "; ".join(
            f"{name} is {getattr(self, name)!r}, not {getattr(other, name)!r}"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)


def _in_range(what: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise ValueError(f"{what}: expected 1 to {largest}, got {value}")


def _positive_seconds(what: str, value: float) -> None:
    if not 0 < value <= MAX_SECONDS:
        raise ValueError(f"{what}: expected seconds > 0 and at most {MAX_SECONDS:g}, got {value}")
