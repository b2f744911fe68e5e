"""The byte layout: what is drawn at the top of its file is what is computed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmblocks import Field, PoolConfig
from shmblocks._os.filelock import PLACE_BYTE, PLACE_BYTES
from shmblocks._state import layout as layout_module
from shmblocks._state.layout import (
    ALLOCATION_HEAD,
    AUX_BYTES,
    CHANNEL_BYTES,
    CLAIM,
    CONFIG_BYTES,
    COUNTER_BYTES,
    ENTRY,
    HEADER_BYTES,
    LEASE,
    LEASE_HEAD,
    MESSAGE_BYTES,
    PAGE,
    PARTICIPANT,
    RECORD,
    RECORD_BODY,
    RECORD_HEAD,
    WAITER,
    WORD,
    Layout,
    LeaseRecord,
    Record,
)
from shmblocks.config import MAX_PARTICIPANTS

DRAWING = layout_module.__doc__ or ""

configs = st.builds(
    lambda blocks, block_size, slots, leases, waiters, claims, channels, messages, sizes: (
        PoolConfig(
            total_tokens=blocks * block_size,
            block_size=block_size,
            max_participants=slots,
            max_leases=leases,
            max_waiters=waiters,
            max_claims=claims,
            channels=channels,
            channel_slots=messages,
            fields=tuple(Field(f"f{n}", (size,), "int8") for n, size in enumerate(sizes)),
        )
    ),
    st.integers(1, 5000),
    st.integers(1, 500),
    st.integers(1, 1024),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 256),
    st.integers(1, 5000),
    st.lists(st.integers(1, 5000), max_size=5),
)


def regions(config: PoolConfig) -> list[tuple[int, int]]:
    """Begin and size of each region, in the order of the drawing."""
    layout = Layout(config)
    blocks = config.total_blocks
    return [
        (0, HEADER_BYTES),
        (HEADER_BYTES, CONFIG_BYTES),
        (layout.counters, COUNTER_BYTES),
        (layout.journal, layout.journal_bytes),
        (layout.participants, 128 * config.max_participants),
        (layout.waiters, 64 * config.max_waiters),
        (layout.leases, 160 * config.max_leases),
        (layout.claims, 64 * config.max_claims),
        (layout.channels, 256 * config.channels + 96 * config.channel_slots),
        (layout.records, 256 * blocks),
        (layout.live, 8 * blocks),
        (layout.buckets, 8 * blocks),
        (layout.bitmap, 8 * -(-blocks // 64)),
        (layout.aux, 64 * blocks),
        *(
            (layout.fields[field.name], config.total_tokens * field.token_bytes)
            for field in config.fields
        ),
        (layout.segment_bytes, 0),
    ]


@given(configs)
def test_no_region_overlaps_another_and_each_begins_on_a_page(config: PoolConfig) -> None:
    end = 0
    for begin, size in regions(config):
        assert begin % PAGE == 0
        assert end <= begin < end + PAGE
        end = begin + size


@given(configs)
def test_everything_before_aux_is_the_state(config: PoolConfig) -> None:
    layout = Layout(config)
    assert layout.state_bytes == layout.aux
    assert layout.bitmap_bytes >= config.total_blocks / 8


@given(configs)
def test_the_messages_lie_behind_the_channels(config: PoolConfig) -> None:
    layout = Layout(config)
    assert layout.messages == layout.channels + CHANNEL_BYTES * config.channels


@given(configs)
def test_the_largest_change_fits_the_journal(config: PoolConfig) -> None:
    # The whole bitmap, a record with its request id, a lease, an entry of the key index, the head,
    # a participant, a waiter, a claim, ten single words, and a message to every channel; each store
    # has a head of 16 bytes.
    layout = Layout(config)
    stores = [
        layout.bitmap_bytes,
        *(
            each.size
            for each in (RECORD, LEASE, ENTRY, ALLOCATION_HEAD, PARTICIPANT, WAITER, CLAIM)
        ),
        *[WORD] * 10,
        *[MESSAGE_BYTES, WORD] * config.channels,
    ]
    assert WORD + sum(16 + size for size in stores) <= layout.journal_bytes


def test_the_structs_have_the_drawn_sizes() -> None:
    drawn = {
        region: int(size)
        for region, size in re.findall(
            r"^ *(\w+)\[\w+\] .* (\d+) B an? \w+$", DRAWING, re.MULTILINE
        )
    }
    assert drawn == {
        "participants": PARTICIPANT.size,
        "waiters": WAITER.size,
        "leases": LEASE.size,
        "claims": CLAIM.size,
        "channels": CHANNEL_BYTES,
        "messages": MESSAGE_BYTES,
        "records": RECORD.size,
        "live": WORD,
        "buckets": WORD,
        "aux": AUX_BYTES,
    }
    assert RECORD_BODY.size == WORD * len(Record._fields)
    assert LEASE_HEAD.size == WORD * len(LeaseRecord._fields)
    assert RECORD_HEAD.size == WORD * Record._fields.index("ready")


# Where the halves of the tables of words begin.
LEFT, RIGHT = 4, 44


def drawn_words() -> dict[str, dict[int, str]]:
    """Number and text of each word of the drawing, by the title of its table."""
    lines = DRAWING.splitlines()
    begin = next(number for number, line in enumerate(lines) if "header words" in line)
    end = next(number for number, line in enumerate(lines) if line.startswith("A *participant"))
    tables: dict[str, dict[int, str]] = {}
    for half in (slice(LEFT, RIGHT), slice(RIGHT, None)):
        table: dict[int, str] = {}
        for line in lines[begin:end]:
            text = line[half].rstrip()
            if title := re.match(r"([a-z]+) words", text):
                table = tables[title[1]] = {}
            elif word := re.match(r"(\d+) +([a-z(].*)", text):
                table[int(word[1])] = word[2]
    return tables


# Constants whose word is drawn by another name.
ALIASES = {"pinned": "registered", "live_index": "index in"}


@pytest.mark.parametrize(
    ("prefix", "title", "at_least"),
    [
        ("H_", "header", 16),
        ("R_", "record", 12),
        ("L_", "lease", 2),
        ("W_", "waiter", 1),
        ("P_", "participant", 3),
    ],
)
def test_the_words_stand_where_they_are_drawn(prefix: str, title: str, at_least: int) -> None:
    drawn = drawn_words()[title]
    constants = {
        name.removeprefix(prefix).lower(): value
        for name, value in vars(layout_module).items()
        if name.startswith(prefix)
    }
    assert len(constants) >= at_least
    for name, number in constants.items():
        parts = [ALIASES[name]] if name in ALIASES else name.split("_")
        assert any(part in drawn[number].lower() for part in parts), (name, drawn[number])
    assert len(set(constants.values())) == len(constants), "one word has two names"


@pytest.mark.parametrize(("record", "title"), [(Record, "record"), (LeaseRecord, "lease")])
def test_a_record_is_read_in_the_order_of_its_drawing(
    record: type[Record | LeaseRecord], title: str
) -> None:
    drawn = drawn_words()[title]
    for number, field in enumerate(record._fields):
        name = field.removesuffix("_ns")
        told = {"live_index": "index in `live`", "message_length": "length of that message"}
        begins = told.get(name, name.replace("_", " "))
        text = drawn[number].removeprefix("is ").replace("_", " ")
        assert text.startswith(begins), (field, drawn[number])


def test_the_bytes_that_are_locked_are_those_of_every_version() -> None:
    assert PLACE_BYTE == 64
    assert PLACE_BYTE + MAX_PARTICIPANTS <= PLACE_BYTE + PLACE_BYTES == 65536
