"""The byte layout: what is drawn at the top of its file is what is computed."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from shmblocks import Field, PoolConfig
from shmblocks._os.filelock import PLACE_BYTE, PLACE_BYTES
from shmblocks._state import layout as layout_module
from shmblocks._state.layout import (
    ALLOCATION_HEAD,
    AUX_BYTES,
    CONFIG_BYTES,
    HEADER_BYTES,
    LEASE,
    MAX_WAITERS,
    PAGE,
    PARTICIPANT,
    RECORD,
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
    lambda blocks, block_size, places, leases, sizes: PoolConfig(
        total_tokens=blocks * block_size,
        block_size=block_size,
        max_participants=places,
        max_leases=leases,
        fields=tuple(Field(f"f{n}", (size,), "int8") for n, size in enumerate(sizes)),
    ),
    st.integers(1, 5000),
    st.integers(1, 500),
    st.integers(1, 1024),
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
        (layout.journal, layout.journal_bytes),
        (layout.participants, 128 * config.max_participants),
        (layout.waiters, 64 * MAX_WAITERS),
        (layout.leases, 64 * config.max_leases),
        (layout.records, 160 * blocks),
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
def test_everything_before_aux_is_the_ledger(config: PoolConfig) -> None:
    layout = Layout(config)
    assert layout.ledger_bytes == layout.aux
    assert layout.bitmap_bytes >= config.total_blocks / 8


@given(configs)
def test_the_largest_change_fits_the_journal(config: PoolConfig) -> None:
    # The whole bitmap, a record with its request id, a lease, the head; a head of 16 bytes each.
    layout = Layout(config)
    stores = [layout.bitmap_bytes, RECORD.size, LEASE.size, ALLOCATION_HEAD.size, PARTICIPANT.size]
    assert WORD + sum(16 + size for size in stores) <= layout.journal_bytes


def test_the_structs_have_the_drawn_sizes() -> None:
    assert (RECORD.size, LEASE.size, PARTICIPANT.size) == (160, 64, 128)
    assert (WAITER.size, AUX_BYTES) == (64, 64)
    for text in ("128 B a place", "64 B a slot", "160 B a block"):
        assert text in DRAWING
    assert len(Record._fields) == 13
    assert len(LeaseRecord._fields) == 8
    assert RECORD_HEAD.size == 8 * Record._fields.index("ready")


def drawn_words(title: str) -> tuple[dict[int, str], dict[int, str]]:
    """Number and text of each word in the left and the right half of a table of the drawing."""
    lines = DRAWING.splitlines()
    table = itertools.dropwhile(lambda line: not line.strip().startswith(title), lines)
    left: dict[int, str] = {}
    right: dict[int, str] = {}
    for line in itertools.takewhile(str.strip, table):
        for column, (number, text) in enumerate(
            re.findall(r"(?:^|  ) *(\d+) {1,3}([a-z].*?)(?=  |$)", line)
        ):
            (right if column else left).setdefault(int(number), text)
    return left, right


def test_the_header_words_stand_where_they_are_drawn() -> None:
    drawn, _ = drawn_words("header words")
    constants = {
        name.removeprefix("H_").lower(): value
        for name, value in vars(layout_module).items()
        if name.startswith("H_")
    }
    assert len(constants) >= 12
    for name, number in constants.items():
        assert any(part in drawn[number].lower() for part in name.split("_")), (name, drawn[number])
    assert len(set(constants.values())) == len(constants), "two words in one place"


def test_the_record_words_stand_where_they_are_drawn() -> None:
    _, drawn = drawn_words("header words")
    told = ["state", "generation", "num_blocks", "num_tokens", "owner", "readers left", "leases",
            "created", "published", "ready", "key"]  # fmt: skip
    for number, begins in enumerate(told):
        assert drawn[number].startswith(begins)
        field = Record._fields[number].removesuffix("_ns").removesuffix("_low")
        assert field.replace("_", " ") == begins.replace("_", " ")
    assert drawn[12].startswith("request id")


def test_the_bytes_that_are_locked_are_those_of_every_version() -> None:
    assert PLACE_BYTE == 64
    assert PLACE_BYTE + MAX_PARTICIPANTS <= PLACE_BYTE + PLACE_BYTES == 65536
