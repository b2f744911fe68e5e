"""Spans of a traced pool, and how a trace reaches the readers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest

from shmblocks import UNBOUNDED, BlockPool, Field, StaleHandleError
from shmblocks.traces import TracedPool
from tests.core.pools import tiny
from tests.support.children import run_program

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

CONFIG = tiny(fields=(Field("x", (2,), "int32"),))


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


@pytest.fixture
def pool(pool_name: str) -> Iterator[TracedPool]:
    with TracedPool.create(pool_name, CONFIG, prefault="off") as pool:
        assert isinstance(pool, TracedPool)
        yield pool


def the(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = (span for span in spans.get_finished_spans() if span.name == name)
    return found


def test_a_reader_is_linked_to_the_span_that_published(
    pool: TracedPool, spans: InMemorySpanExporter
) -> None:
    handle = pool.alloc(3)
    assert handle is not None
    pool.publish(handle, readers=2)
    pool.open(handle).release()
    names = ("alloc", "publish", "open")
    alloc, publish, opened = (the(spans, f"shmblocks.{name}") for name in names)
    assert alloc.attributes is not None
    assert alloc.attributes["shmblocks.pool"] == pool.name
    assert alloc.attributes["shmblocks.tokens"] == 3
    assert alloc.attributes["shmblocks.served"] is True
    (link,) = opened.links
    assert publish.context is not None
    assert link.context.trace_id == publish.context.trace_id
    assert link.context.span_id == publish.context.span_id


def test_the_trace_travels_with_the_blocks_to_every_process_of_the_pool(
    pool: TracedPool, spans: InMemorySpanExporter
) -> None:
    handle = pool.alloc(1)
    assert handle is not None
    assert pool.traceparent(handle) is None
    pool.publish(handle)
    context = the(spans, "shmblocks.publish").context
    assert context is not None
    with TracedPool.attach(pool.name, prefault="off") as other:
        assert isinstance(other, TracedPool)
        expected = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
        assert other.traceparent(handle) == expected
    pool.free(handle)
    with pytest.raises(StaleHandleError):
        pool.traceparent(handle)


def test_new_blocks_have_no_trace_of_those_before(
    pool: TracedPool, spans: InMemorySpanExporter
) -> None:
    for _ in range(20):
        handle = pool.alloc(1)
        assert handle is not None
        assert pool.traceparent(handle) is None
        pool.free(pool.publish(handle))
    assert spans.get_finished_spans()


def test_a_hit_is_linked_and_a_miss_is_none(pool: TracedPool, spans: InMemorySpanExporter) -> None:
    key = b"k" * 16
    assert pool.get(key) is None
    handle = pool.alloc(1)
    assert handle is not None
    pool.publish(handle, readers=UNBOUNDED, key=key)
    for lease in pool.get(key) or ():
        lease.release()
    miss, hit = (span for span in spans.get_finished_spans() if span.name == "shmblocks.get")
    assert miss.attributes is not None
    assert hit.attributes is not None
    assert (miss.attributes["shmblocks.hit"], len(miss.links)) == (False, 0)
    assert (hit.attributes["shmblocks.hit"], len(hit.links)) == (True, 1)


def test_a_reservation_is_an_alloc(pool: TracedPool, spans: InMemorySpanExporter) -> None:
    with pool.reserve(2) as reservation:
        reservation.publish()
    attributes = the(spans, "shmblocks.alloc").attributes
    assert attributes is not None
    assert attributes["shmblocks.tokens"] == 2
    assert "shmblocks.wait_seconds" in attributes
    assert the(spans, "shmblocks.publish").context is not None


def test_a_load_has_its_open_as_a_child(pool: TracedPool, spans: InMemorySpanExporter) -> None:
    import torch

    handle = pool.put({"x": torch.ones(2, 2, dtype=torch.int32)})
    assert pool.take(handle)["x"].sum() == 4
    load, opened = the(spans, "shmblocks.load"), the(spans, "shmblocks.open")
    assert load.context is not None
    assert opened.parent is not None
    assert opened.parent.span_id == load.context.span_id


def test_an_error_is_told_by_the_operation_and_noted_in_its_span(
    pool: TracedPool, spans: InMemorySpanExporter
) -> None:
    handle = pool.alloc(1)
    assert handle is not None
    pool.free(handle)
    with pytest.raises(StaleHandleError):
        pool.open(handle)
    assert the(spans, "shmblocks.open").status.status_code is trace.StatusCode.ERROR


def test_asyncio_is_traced_too(pool: TracedPool, spans: InMemorySpanExporter) -> None:
    async def main() -> None:
        handle = await pool.alloc_async(1)
        pool.publish(handle)
        await pool.take_async(handle)

    asyncio.run(main())
    names = [span.name.removeprefix("shmblocks.") for span in spans.get_finished_spans()]
    assert names == ["alloc", "publish", "open", "load"]
    assert len(the(spans, "shmblocks.open").links) == 1


def test_without_a_tracer_nothing_is_kept(pool: TracedPool) -> None:
    handle = pool.alloc(1)
    assert handle is not None
    pool.open(pool.publish(handle, readers=2)).release()
    assert pool.traceparent(handle) is None


def test_a_pool_that_is_not_traced_does_not_import_opentelemetry() -> None:
    program = (
        "import sys, shmblocks, shmblocks.traces; "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    run_program([sys.executable, "-c", program])
    assert TracedPool.open is not BlockPool.open
