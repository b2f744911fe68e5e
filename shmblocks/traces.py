"""Spans of OpenTelemetry for what a process does with a pool (`pip install 'shmblocks[otel]'`).

    pool = TracedPool.attach("vision")       # a BlockPool in everything else

    shmblocks.alloc      from the call to the blocks: `wait_seconds`; `reserve` too
    shmblocks.publish    its context is kept with the blocks
    shmblocks.open       linked to the span that published
    shmblocks.get        `hit`; linked likewise
    shmblocks.load       `take`: open, copy, release

Each has `pool` and `tokens`. Spans of readers are *linked* to the publisher's and not its children,
since several readers may have it; `traceparent(handle)` continues its trace where that is wanted.

Contract
- A `BlockPool` pays nothing for any of this. A `TracedPool` pays a span for each operation, and one
  more short section under the lock for each publish, open and hit.
- The context is kept in the pool's shared memory, so it reaches every process that has the handle,
  whatever it came by. Readers that are not traced do not mind it.

What it does not do: trace channels, `TensorCache` claims, or transfers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shmblocks._state.layout import TRACE_BYTES
from shmblocks.errors import StaleHandleError
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease, Readers, Reservation
from shmblocks.pool import BlockPool

if TYPE_CHECKING:
    import torch
    from opentelemetry.trace import Span, SpanContext

    from shmblocks.cuda.use import Stream

_TRACE_ID_BYTES = 16
_NO_TRACE = bytes(TRACE_BYTES)


class TracedPool(BlockPool):
    """A `BlockPool` whose operations are spans of OpenTelemetry's global tracer."""

    def _reserved_by_core(
        self, num_tokens: int, req_id: str | None, timeout: float | None, moment: int
    ) -> BlockHandle | None:
        # By Python, so that every `alloc` passes through `_alloc` and its span.
        return None

    def _alloc(
        self,
        num_blocks: int,
        num_tokens: int,
        req_id: str | None,
        fake: bool,
        timeout: float | None,
    ) -> BlockHandle | None:
        with self._alloc_span(num_tokens) as span:
            handle = super()._alloc(num_blocks, num_tokens, req_id, fake, timeout)
            span.set_attribute("shmblocks.served", handle is not None)
            return handle

    async def alloc_async(
        self, num_tokens: int, req_id: str | None = None, timeout: float | None = None
    ) -> BlockHandle:
        """As `BlockPool.alloc_async`, as a span."""
        with self._alloc_span(num_tokens):
            return await super().alloc_async(num_tokens, req_id, timeout)

    def reserve(
        self, num_tokens: int, *, req_id: str | None = None, timeout: float | None = None
    ) -> Reservation:
        """As `BlockPool.reserve`; its span ends when the blocks are there."""
        with self._alloc_span(num_tokens):
            return super().reserve(num_tokens, req_id=req_id, timeout=timeout)

    async def reserve_async(
        self, num_tokens: int, *, req_id: str | None = None, timeout: float | None = None
    ) -> Reservation:
        """As `BlockPool.reserve_async`; its span ends when the blocks are there."""
        with self._alloc_span(num_tokens):
            return await super().reserve_async(num_tokens, req_id=req_id, timeout=timeout)

    def publish(
        self,
        handle: BlockHandle,
        *,
        readers: Readers = 1,
        num_tokens: int | None = None,
        stream: Stream | None = None,
        key: bytes | None = None,
        hold: float = 0.0,
    ) -> BlockHandle:
        """As `BlockPool.publish`, as a span whose context the readers find."""
        with self._span("publish", handle.num_tokens) as span:
            context = span.get_span_context()
            if context.is_valid:
                self.state.note_trace(self._real(handle), _packed(context))
            return super().publish(
                handle, readers=readers, num_tokens=num_tokens, stream=stream, key=key, hold=hold
            )

    def open(self, handle: BlockHandle, stream: Stream | None = None) -> Lease:
        """As `BlockPool.open`, as a span that is linked to the publisher's."""
        with self._span("open", handle.num_tokens) as span:
            self._link(span, handle)
            return super().open(handle, stream)

    async def open_async(self, handle: BlockHandle) -> Lease:
        """As `BlockPool.open_async`, as a span that is linked to the publisher's."""
        with self._span("open", handle.num_tokens) as span:
            self._link(span, handle)
            return await super().open_async(handle)

    def get(
        self, key: bytes, *, leases: int = 1, num_tokens: int | None = None
    ) -> list[Lease] | None:
        """As `BlockPool.get`, as a span that is linked to the publisher's."""
        with self._span("get", num_tokens) as span:
            entry = self.find(key)
            if entry is not None:
                self._link(span, entry.handle)
            found = super().get(key, leases=leases, num_tokens=num_tokens)
            span.set_attribute("shmblocks.hit", found is not None)
            return found

    def take(self, handle: BlockHandle, *, stream: Stream | None = None) -> dict[str, torch.Tensor]:
        """As `BlockPool.take`, as a span."""
        with self._span("load", handle.num_tokens):
            return super().take(handle, stream=stream)

    async def take_async(self, handle: BlockHandle) -> dict[str, torch.Tensor]:
        """As `BlockPool.take_async`, as a span."""
        with self._span("load", handle.num_tokens):
            return await super().take_async(handle)

    def traceparent(self, handle: BlockHandle) -> str | None:
        """The W3C `traceparent` of the span that published; None: it was not traced.

        Raises `StaleHandleError`.
        """
        context = self.state.trace_of(self._real(handle))
        if context == _NO_TRACE:
            return None
        return f"00-{context[:_TRACE_ID_BYTES].hex()}-{context[_TRACE_ID_BYTES:].hex()}-01"

    @contextlib.contextmanager
    def _span(self, name: str, num_tokens: int | None) -> Iterator[Span]:
        from opentelemetry import trace

        attributes: dict[str, str | int] = {"shmblocks.pool": self.name}
        if num_tokens is not None:
            attributes["shmblocks.tokens"] = num_tokens
        tracer = trace.get_tracer("shmblocks")
        with tracer.start_as_current_span(f"shmblocks.{name}", attributes=attributes) as span:
            yield span

    @contextlib.contextmanager
    def _alloc_span(self, num_tokens: int) -> Iterator[Span]:
        started = time.monotonic()
        with self._span("alloc", num_tokens) as span:
            yield span
            span.set_attribute("shmblocks.wait_seconds", time.monotonic() - started)

    def _link(self, span: Span, handle: BlockHandle) -> None:
        """Before the blocks are taken: what goes wrong here has taken nothing."""
        if not span.is_recording():
            return
        with contextlib.suppress(StaleHandleError):  # the operation itself says so
            context = self.state.trace_of(self._real(handle))
            if context != _NO_TRACE:
                span.add_link(_unpacked(context))


def _packed(context: SpanContext) -> bytes:
    trace_id: int = context.trace_id
    span_id: int = context.span_id
    return trace_id.to_bytes(_TRACE_ID_BYTES, "big") + span_id.to_bytes(8, "big")


def _unpacked(data: bytes) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(
        trace_id=int.from_bytes(data[:_TRACE_ID_BYTES], "big"),
        span_id=int.from_bytes(data[_TRACE_ID_BYTES:], "big"),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
