"""What a pool holds: its fields and its sizes, fixed at creation.

The config is written, msgspec-encoded, into the segment's header, so that attaching needs only the
name. Reading it back is reading untrusted bytes: every rule below is checked again then.

It does not import torch: dtypes are the short names that users write (`bf16`), and only a view
turns them into `torch.dtype`.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeVar, get_args

import msgspec

if TYPE_CHECKING:
    import torch

# Bytes per element, and the name of the `torch.dtype`. (Torch has `fp8_e8m0fnu` from 2.7 on; a view
# of such a field says so where torch is older.)
DTYPES: dict[str, tuple[int, str]] = {
    "uint8": (1, "uint8"),
    "int8": (1, "int8"),
    "int16": (2, "int16"),
    "int32": (4, "int32"),
    "int64": (8, "int64"),
    "uint16": (2, "uint16"),
    "uint32": (4, "uint32"),
    "uint64": (8, "uint64"),
    "bf16": (2, "bfloat16"),
    "fp16": (2, "float16"),
    "fp32": (4, "float32"),
    "fp64": (8, "float64"),
    "fp8_e4m3": (1, "float8_e4m3fn"),
    "fp8_e5m2": (1, "float8_e5m2"),
    "fp8_e4m3fnuz": (1, "float8_e4m3fnuz"),
    "fp8_e5m2fnuz": (1, "float8_e5m2fnuz"),
    "fp8_e8m0fnu": (1, "float8_e8m0fnu"),
    "complex64": (8, "complex64"),
    "complex128": (16, "complex128"),
    "bool": (1, "bool"),
}

BLOCK_SIZE_ENV = "SGLANG_MULTIMODAL_BLOCK_SIZE"
DEFAULT_BLOCKS_ENV = "SGLANG_DEFAULT_MULTIMODAL_BLOCKS"

# Blocks per pool. 2**24 blocks of 128 tokens are 2 billion tokens; the bound keeps every size
# computed from an untrusted header inside 64 bits.
MAX_BLOCKS = 1 << 24
MAX_BLOCK_SIZE = 1 << 20
# Smaller: fewer processes can attach. Larger: each check for the dead asks the kernel more often
# (about 1 us a slot).
MAX_PARTICIPANTS = 1024
# Smaller: fewer readers at once. Larger: finding the leases of one allocation takes longer.
MAX_LEASES = 1 << 16
# Smaller: fewer threads and coroutines can wait for blocks at once. Larger: 64 bytes a slot, and a
# slower search for the head of the wait queue.
MAX_WAITERS = 1 << 14
# Smaller: fewer kinds of message in one pool. Larger: 64 bytes a channel.
MAX_CHANNELS = 256
# Messages that all channels of a pool hold together. Larger: some 64 bytes a message.
MAX_CHANNEL_SLOTS = 1 << 20
# Keys of the cache that can be claimed at once. Larger: finding a claim takes longer.
MAX_CLAIMS = 1 << 14
# Of every element a field has per token, in bytes; a bound for untrusted headers again.
MAX_TOKEN_BYTES = 1 << 26
# 31 years; nanoseconds since boot plus this many still fit a word.
MAX_SECONDS = 1e9

T = TypeVar("T")

_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,3}")


Allocation = Literal["next fit", "first fit"]


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
        require_type("field name", self.name, str)
        if not self.name.isidentifier() or len(self.name) > 64:
            raise ValueError(
                f"field name: expected an identifier of at most 64 letters, got {self.name!r}"
            )
        what = f"field {self.name}"
        shape = _sequence(f"shape of {what}", self.shape)
        _set(self, "shape", tuple(whole_number(f"shape of {what}", size) for size in shape))
        if not isinstance(self.dtype, str):
            raise TypeError(
                f"dtype of {what}: expected a name such as 'bf16', got "
                f"{type(self.dtype).__name__}; Field.of(...) takes a torch.dtype"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype of {what}: expected one of {', '.join(DTYPES)}, got {self.dtype!r}"
            )
        require_type(f"transposed of {what}", self.transposed, bool)
        if len(self.shape) > 8 or any(size < 1 for size in self.shape):
            raise ValueError(
                f"shape of {what}: expected up to 8 sizes of at least 1, got {self.shape}"
            )
        if self.token_bytes > MAX_TOKEN_BYTES:
            raise ValueError(
                f"shape of {what}: {self.token_bytes} bytes per token are more than the "
                f"{MAX_TOKEN_BYTES} that a pool supports"
            )
        if self.transposed and len(self.shape) != 1:
            raise ValueError(
                f"transposed of {what}: only a field of one dimension per token can be "
                f"transposed, got the shape {self.shape}"
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
        return cls(name, shape, dtype_name(dtype), transposed)

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
    max_waiters         threads and coroutines, over all processes, that can wait for blocks at once
    channels            channels that the pool can have
    channel_slots       messages that all channels together can hold
    max_claims          keys of the cache that can be claimed at once
    allocation          where free blocks are searched for: `"next fit"`, from where the last search
                        ended, so that freed blocks rest longest and a late reader's bug shows; or
                        `"first fit"`, from the start, so that few pages are touched
    unclaimed_timeout   seconds after which published blocks that nobody opened are reclaimed
    lock_timeout        seconds to wait for the pool's lock before `PoolTimeoutError`
    stream_timeout      seconds that a CPU waits for a CUDA stream before `PoolTimeoutError`
    device              where the fields lie: `cpu` (shared memory) or `cuda:N`, as the creator
                        counts its devices
    group               name of the Unix group that may use the pool too (mode 0660); None: 0600

    Sizes are whole numbers; numpy's are taken too. A wrong type is a `TypeError`, a wrong value a
    `ValueError`, and each names the argument.
    """

    total_tokens: int
    fields: tuple[Field, ...] = ()
    block_size: int = msgspec.field(default_factory=default_block_size)
    default_num_blocks: int = msgspec.field(default_factory=default_default_num_blocks)
    max_participants: int = 64
    max_leases: int = 1024
    max_waiters: int = 1024
    channels: int = 8
    channel_slots: int = 8 * (1024 + 16)
    max_claims: int = 256
    allocation: Allocation = "next fit"
    unclaimed_timeout: float = 300.0
    lock_timeout: float = 30.0
    stream_timeout: float = 300.0
    group: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, largest in _SIZES:
            size = whole_number(name, getattr(self, name))
            _set(self, name, size)
            if largest:
                _in_range(name, size, largest)
        if self.total_tokens < 1 or self.total_tokens % self.block_size:
            raise ValueError(
                f"total_tokens: expected a multiple of block_size ({self.block_size}), "
                f"got {self.total_tokens}"
            )
        _in_range("total_tokens / block_size", self.total_blocks, MAX_BLOCKS)
        for name in ("unclaimed_timeout", "lock_timeout", "stream_timeout"):
            _set(self, name, _positive_seconds(name, getattr(self, name)))
        if self.allocation not in get_args(Allocation):
            raise ValueError(
                f"allocation: expected 'next fit' or 'first fit', got {self.allocation!r}"
            )
        require_type("device", self.device, str)
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device: expected 'cpu' or 'cuda:N', got {self.device!r}")
        if self.group is not None:
            require_type("group", self.group, str)
        _set(self, "fields", _sequence("fields", self.fields))
        for field in self.fields:
            require_type("fields", field, Field)
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


# The sizes of a config, and how large each may be; 0: checked together with others.
_SIZES = (
    ("block_size", MAX_BLOCK_SIZE),
    ("total_tokens", 0),
    ("default_num_blocks", MAX_BLOCKS),
    ("max_participants", MAX_PARTICIPANTS),
    ("max_leases", MAX_LEASES),
    ("max_waiters", MAX_WAITERS),
    ("channels", MAX_CHANNELS),
    ("channel_slots", MAX_CHANNEL_SLOTS),
    ("max_claims", MAX_CLAIMS),
)


# ---- arguments -------------------------------------------------------------------------------


def whole_number(what: str, value: SupportsIndex) -> int:
    """An int of an int or of what stands for one (numpy's integers); TypeError that names it."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{what}: expected a whole number, got {type(value).__name__} {value!r}")


def require_type(what: str, value: object, expected: type) -> None:
    """TypeError that names the argument unless the value is of the expected type."""
    if not isinstance(value, expected):
        raise TypeError(f"{what}: expected {expected.__name__}, got {type(value).__name__}")


def _set(struct: msgspec.Struct, name: str, value: object) -> None:
    """Set a field of a frozen struct, while it is made."""
    msgspec.structs.force_setattr(struct, name, value)


def _sequence(what: str, value: Iterable[T]) -> tuple[T, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(value)
    raise TypeError(f"{what}: expected a tuple, got {type(value).__name__} {value!r}")


def _in_range(what: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise ValueError(f"{what}: expected 1 to {largest}, got {value}")


def _positive_seconds(what: str, value: float) -> float:
    # float(...) of numpy's numbers too, but not of a text.
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{what}: expected seconds, got {type(value).__name__} {value!r}")
    if not 0 < value <= MAX_SECONDS:
        raise ValueError(f"{what}: expected seconds > 0 and at most {MAX_SECONDS:g}, got {value}")
    return float(value)
