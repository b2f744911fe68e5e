"""Views: the fields of an allocation as torch tensors over the shared memory, without a copy.

Contract
- Each tensor that is handed out has a storage of its own, of exactly the rows of its allocation.
  Nothing that torch does to it (resize, swap of the storage, pickle, autograd, inference mode)
  reaches the rows of another allocation, or a later view of the same one.
- A tensor borrows the pool's mapping and keeps it alive, so that closing the pool under a living
  tensor is safe: the memory stays mapped until the last tensor is gone.
- What the memory *means* is not kept: after the lease or the allocation ended, another allocation
  may use the blocks. Copy (`tensor.clone()`) what must outlive it.
- Torch is imported by the first tensor.

Read-only memory: tensors of a lease may lie in a second mapping of the fields that the kernel lets
nobody write to. Torch has no read-only tensors; a stray write is a segmentation fault at the line
that writes, instead of a silent change of what other readers see.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from shmblocks import _core
from shmblocks._state.layout import AUX_BYTES, Layout
from shmblocks._state.pool_state import PoolState
from shmblocks.config import DTYPES, Field, PoolConfig
from shmblocks.errors import InvalidStateError
from shmblocks.handle import BlockHandle

if TYPE_CHECKING:
    import torch

AUX = "aux"
# Code and bits of DLPack's data types, by torch's names. What is not here is made by torch alone.
_DLPACK = {
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "bfloat16": (4, 16),
}
_AUX_ITEMS = AUX_BYTES // 4


# Gives so many tokens of a field, from the first given on; or elements, from a byte on.
Maker = Callable[[int, int], "torch.Tensor"]


class FieldMemory(Protocol):
    """Where fields lie: gives bytes of it as tensors and as memoryviews."""

    def maker(self, dtype: torch.dtype) -> Maker:
        """What gives `[count]` elements from byte `offset` on, with a storage of its own, when it
        is called with (offset, count)."""
        ...

    def memory(self, offset: int, size: int) -> memoryview:
        """The same bytes for the CPU; `InvalidStateError` where it cannot reach them."""
        ...


class HostMemory:
    """The segment's mapping, or a read-only one of a part of it."""

    def __init__(self, mapping: mmap.mmap, start: int = 0) -> None:
        """Byte 0 of `mapping` is byte `start` of the segment."""
        self._start = start
        self._bytes = memoryview(mapping)
        self._buffer: mmap.mmap | ctypes.Array[ctypes.c_char] = mapping
        if self._bytes.readonly:
            # Torch warns of buffers that are not writable; it is told nothing of that.
            self._buffer = _window_on(mapping)

    def maker(self, dtype: torch.dtype) -> Maker:
        import torch

        from_buffer, buffer, start = torch.frombuffer, self._buffer, self._start

        def make(offset: int, count: int) -> torch.Tensor:
            return from_buffer(buffer, dtype=dtype, count=count, offset=offset - start)

        return make

    def compiled(self, field: Field, offset: int, otherwise: Maker) -> Maker | None:
        """What gives tokens of the field that begins at `offset`, by the compiled core; None: it
        cannot, or is not there."""
        made_by, kind = _core.tensors(), _DLPACK.get(DTYPES[field.dtype][1])
        if made_by is None or kind is None:
            return None
        import torch

        try:
            numbers = (offset - self._start, field.token_bytes, *kind, field.transposed)
            from_dlpack = torch._C._from_dlpack
            return made_by(self._bytes, numbers, field.shape, from_dlpack, otherwise).make
        except NotImplementedError:
            return None

    def memory(self, offset: int, size: int) -> memoryview:
        at = offset - self._start
        return self._bytes[at : at + size]


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of the buffer protocol (docs.python.org/3/c-api/buffer.html)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _window_on(mapping: mmap.mmap) -> ctypes.Array[ctypes.c_char]:
    """An object whose buffer is the mapping's memory; keeps the mapping alive.

    It calls the memory writable. The kernel does not agree.
    """
    buffer = _PyBuffer()
    get, release = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
    # Twice, as in mutex.py: interrupted in the first, the second does it. What was released, or
    # never had, is released by doing nothing.
    try:
        try:
            get(ctypes.py_object(mapping), ctypes.byref(buffer), 0)
            address: int = buffer.buf
        finally:
            release(ctypes.byref(buffer))
    finally:
        release(ctypes.byref(buffer))
    kind: type[ctypes.Array[ctypes.c_char]] = type(
        "ReadOnlyWindow", (ctypes.c_char * len(mapping),), {}
    )
    window = kind.from_address(address)
    window._mapping = mapping  # type: ignore[attr-defined]
    return window


class FieldTensors:
    """The fields of one pool as tensors, over the memory that they lie in."""

    def __init__(
        self,
        config: PoolConfig,
        layout: Layout,
        aux: FieldMemory,
        fields: FieldMemory | None = None,
    ) -> None:
        """`aux` always lies in the segment; `fields` elsewhere, if given."""
        self._config = config
        self._layout = layout
        self._aux = aux
        self._memory = fields or aux
        self._fields = {field.name: field for field in config.fields}
        self.block_size = config.block_size
        # Made once for each field: each access of a view passes here.
        self._makers: dict[str, Maker] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._fields)

    def field(self, name: str) -> Field:
        """The field's description; KeyError names the fields that there are."""
        try:
            return self._fields[name]
        except KeyError:
            raise KeyError(
                f"field: expected one of {', '.join(self._fields) or '(the pool has none)'}, "
                f"got {name!r}"
            ) from None

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Tokens `first .. first + count - 1` of a field: `[count, *shape]`; a transposed field:
        `[k, count]`."""
        make = self._makers.get(name) or self._maker(name)
        return make(first, count)

    def _maker(self, name: str) -> Maker:
        import torch

        field = self.field(name)
        make = self._memory.maker(getattr(torch, DTYPES[field.dtype][1]))
        start, token_bytes = self._layout.fields[name], field.token_bytes
        elements, shape = field.elements, field.shape

        def flat(first: int, count: int) -> torch.Tensor:
            return make(start + first * token_bytes, count)

        def shaped(first: int, count: int) -> torch.Tensor:
            rows = make(start + first * token_bytes, count * elements)
            return rows.view(count, *shape)

        def transposed(first: int, count: int) -> torch.Tensor:
            return shaped(first, count).t()

        maker: Maker = transposed if field.transposed else shaped if shape else flat
        if isinstance(self._memory, HostMemory):
            maker = self._memory.compiled(field, start, maker) or maker
        self._makers[name] = maker
        return maker

    def row_bytes(self, name: str, first: int, count: int) -> memoryview:
        """The same rows as bytes, as stored."""
        field = self.field(name)
        offset = self._layout.fields[name] + first * field.token_bytes
        return self._memory.memory(offset, count * field.token_bytes)

    def whole(self, name: str) -> torch.Tensor:
        """The field of every token of the pool, as stored: `[total_tokens, *shape]`."""
        rows = self.rows(name, 0, self._config.total_tokens)
        return rows.t() if self.field(name).transposed else rows

    def aux(self, block: int) -> torch.Tensor:
        """int32 `[16]` of one block."""
        return self._aux_maker()(self._layout.aux + block * AUX_BYTES, _AUX_ITEMS)

    def whole_aux(self) -> torch.Tensor:
        """int32 `[total_blocks, 16]`."""
        count = self._config.total_blocks * _AUX_ITEMS
        return self._aux_maker()(self._layout.aux, count).view(-1, _AUX_ITEMS)

    def _aux_maker(self) -> Maker:
        maker = self._makers.get(AUX)
        if maker is None:
            import torch

            maker = self._makers[AUX] = self._aux.maker(torch.int32)
        return maker

    def aux_bytes(self, block: int) -> memoryview:
        """The 64 bytes of one block's aux."""
        return self._aux.memory(self._layout.aux + block * AUX_BYTES, AUX_BYTES)


class Guard(Protocol):
    """Says at each access of a view whether the blocks may still be used."""

    def require(self, handle: BlockHandle) -> None:
        """Raise `InvalidStateError` when they may not."""
        ...


class ReservationGuard:
    """For views of reservations: until it is published, freed or grown. Lock-free."""

    __slots__ = ("_state",)

    def __init__(self, state: PoolState) -> None:
        self._state = state

    def require(self, handle: BlockHandle) -> None:
        state = self._state
        if state.is_reserved(handle):
            return
        if state.is_closed:
            raise state.mutex.closed()
        raise InvalidStateError(
            f"{handle}: it was published or freed, so that its blocks cannot be written through "
            "this view any more; write before"
        )


class LeaseGuard:
    """For a lease and its views: until it is released. `is_ready`: its blocks are complete."""

    __slots__ = ("_state", "is_open", "is_ready")

    def __init__(self, state: PoolState, is_ready: bool) -> None:
        self._state = state
        self.is_open = True
        self.is_ready = is_ready

    def require(self, handle: BlockHandle) -> None:
        if not self.is_open or self._state.is_closed:
            raise InvalidStateError(f"{handle}: the lease was released; read within it")
        if not self.is_ready:
            self.is_ready = self._state.is_ready(handle)


class BlockView(Mapping[str, "torch.Tensor"]):
    """The fields of one allocation. Borrows the memory, keeps the mapping alive, owns no block.

    `view["input_embeddings"]` is `[num_tokens, *shape]` of the field's dtype (a transposed field:
    `[k, num_tokens]`), in place; `view.aux` the allocation's int32[16]. Each access makes a tensor
    of its own. When the reservation was published or freed, or the lease released, the next access
    raises `InvalidStateError`; tensors that were taken before still look at the memory.
    """

    __slots__ = ("_guard", "_owner", "_tensors", "handle", "start_token")

    def __init__(
        self, tensors: FieldTensors, handle: BlockHandle, guard: Guard, owner: object
    ) -> None:
        """`owner`, a pool or a lease, is kept alive: dropped under a view, it must not leave."""
        self._tensors = tensors
        self.handle = handle
        self._guard = guard
        self._owner = owner
        self.start_token = handle.start_block * tensors.block_size

    @property
    def num_tokens(self) -> int:
        """Tokens of every field."""
        return self.handle.num_tokens

    @property
    def aux(self) -> torch.Tensor:
        """int32[16]: `aux[0]` total length in tokens, `aux[1]` mrope position delta."""
        self._guard.require(self.handle)
        return self._tensors.aux(self.handle.start_block)

    def __getitem__(self, name: str) -> torch.Tensor:
        self._guard.require(self.handle)
        return self._tensors.rows(name, self.start_token, self.handle.num_tokens)

    def memory(self, name: str) -> memoryview:
        """The bytes of a field's rows as they are stored (`"aux"`: its 64 bytes), in place.

        Writable in a view of a reservation, read-only in one of a lease with read-only memory.
        """
        self._guard.require(self.handle)
        if name == AUX:
            return self._tensors.aux_bytes(self.handle.start_block)
        return self._tensors.row_bytes(name, self.start_token, self.handle.num_tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.names)

    def __len__(self) -> int:
        return len(self._tensors.names)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"BlockView({self.handle}, fields={', '.join(self._tensors.names)})"


def bytes_as_tensor(
    fields: Mapping[str, torch.Tensor], dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """The first bytes of the one field of a byte pool as a contiguous tensor; no copy."""
    names = list(fields)
    rows = fields[names[0]] if len(names) == 1 else None
    if rows is None or rows.element_size() != 1 or rows.dim() != 2:
        raise InvalidStateError(
            "expected a byte pool, of one field of bytes (`byte_config`), got the fields "
            f"{', '.join(names) or '(none)'}"
        )
    return rows_as_tensor(rows, dtype, shape)


def rows_as_tensor(rows: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The first bytes of rows of bytes, `[n, bytes]`, as a contiguous tensor; no copy."""
    size = math.prod(shape) * dtype.itemsize
    if size > rows.numel():
        raise ValueError(
            f"shape: expected at most {rows.numel()} bytes, {list(shape)} of {dtype} are {size}"
        )
    return rows.view(-1)[:size].view(dtype).view(tuple(shape))


def fill(view: BlockView, tensors: Mapping[str, torch.Tensor], num_tokens: int) -> None:
    """Copy `tensors` into a view, and say in `aux` how many tokens they are.

    `tensors` has every field, of its dtype, `[num_tokens, *shape]` (a transposed field
    `[k, num_tokens]`), on any device and with any strides; `"aux"` int32[16] may be among them.
    """
    import torch

    with torch.no_grad():
        aux = tensors.get(AUX)
        if aux is None:
            view.aux.zero_()[0] = num_tokens
        else:
            view.aux.copy_(aux)
        for name in view:
            view[name].copy_(tensors[name])


def count_tokens(config: PoolConfig, tensors: Mapping[str, torch.Tensor]) -> int:
    """How many tokens `tensors` are; TypeError or ValueError when they do not fit the fields."""
    import torch

    fields = {field.name: field for field in config.fields}
    unknown = [name for name in tensors if name not in fields and name != AUX]
    missing = [name for name in fields if name not in tensors]
    if unknown or missing or not fields:
        raise ValueError(
            f"tensors: expected the fields {', '.join(fields) or '(the pool has none)'}, got "
            f"{', '.join(tensors) or 'none'}"
        )
    num_tokens = -1
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensors[{name!r}]: expected a tensor, got {type(tensor).__name__}")
        if name == AUX:
            _require_like(name, tensor, torch.int32, (_AUX_ITEMS,))
            continue
        field = fields[name]
        axis = 1 if field.transposed else 0
        if num_tokens < 0 and tensor.dim() > axis:
            num_tokens = tensor.shape[axis]
        shape = (*field.shape, num_tokens) if field.transposed else (num_tokens, *field.shape)
        _require_like(name, tensor, getattr(torch, DTYPES[field.dtype][1]), shape)
    if num_tokens < 1:
        raise ValueError("tensors: expected at least one token, got none")
    return num_tokens


def _require_like(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(
            f"tensors[{name!r}]: expected {dtype}, got {tensor.dtype}; convert it with `.to(dtype)`"
        )
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"tensors[{name!r}]: expected the shape {list(shape)}, got {list(tensor.shape)}"
        )


_core.know("guard", LeaseGuard)
_core.know("view", BlockView)
