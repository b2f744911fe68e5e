"""The mappings of a segment: to read, to write, private; in forked children; left out of dumps."""

from __future__ import annotations

import gc
import mmap
import os
import re
import signal
from collections.abc import Iterator

import pytest

from shmblocks import BlockPool, PoolClosedError
from shmblocks._os.segment import Segment, create_unnamed, path_of
from tests.support.children import fork, run_in_fork, wait_until

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE


@pytest.fixture
def segment() -> Iterator[Segment]:
    with create_unnamed(SIZE, "/any", None) as file:
        made = Segment(file.fileno(), SIZE, "/any")
    yield made
    if not made._file.closed:
        made.stop_prefault()
        made.drop()


def test_a_read_only_mapping_shows_what_is_written_and_takes_no_write(segment: Segment) -> None:
    readonly = segment.readonly_mapping(2 * PAGE, PAGE)
    segment.memory[2 * PAGE + 3] = 9
    assert (len(readonly), readonly[3]) == (PAGE, 9)
    assert memoryview(readonly).readonly
    with pytest.raises(TypeError, match="readonly"):
        readonly[0] = 1


def test_a_stray_write_through_a_read_only_mapping_is_a_fault(segment: Segment) -> None:
    import ctypes

    readonly = segment.readonly_mapping(0, PAGE)

    def write() -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        flags = ctypes.pythonapi.PyObject_GetBuffer
        buffer = (ctypes.c_void_p * 16)()
        assert flags(ctypes.py_object(readonly), ctypes.byref(buffer), 0) == 0
        ctypes.memset(buffer[0] or 0, 1, 1)

    with fork(lambda _: write()) as child:
        assert child.wait() == -signal.SIGSEGV
        child.kill()
    assert segment.memory[0] == 0


def test_the_same_read_only_mapping_is_given_again(segment: Segment) -> None:
    first = segment.readonly_mapping(0, PAGE)
    assert segment.readonly_mapping(0, PAGE) is first
    assert segment.readonly_mapping(PAGE, PAGE) is not first


def test_a_private_mapping_is_its_callers_alone(segment: Segment) -> None:
    segment.memory[0] = 1
    one, other = segment.private_mapping(0, PAGE), segment.private_mapping(0, PAGE)
    one[0] = 5
    assert (one[0], other[0], segment.memory[0]) == (5, 1, 1)


def test_mappings_go_with_the_segment_or_with_their_last_view(segment: Segment) -> None:
    inode = os.fstat(segment.mapped_fd).st_ino
    segment.memory[:4] = b"SHMB"
    view = memoryview(segment.readonly_mapping(0, PAGE))
    segment.readonly_mapping(PAGE, PAGE)
    assert len(flags_of(inode)) == 3
    segment.drop()
    gc.collect()
    assert len(flags_of(inode)) == 1
    assert bytes(view[:4]) == b"SHMB"
    del view
    gc.collect()
    assert flags_of(inode) == []


def test_a_dropped_segment_gives_no_more_mappings(segment: Segment) -> None:
    segment.drop()
    assert segment.mapped_fd == -1
    for make in (segment.readonly_mapping, segment.private_mapping):
        with pytest.raises(PoolClosedError, match="pool /any: closed in this process"):
            make(0, PAGE)


def test_a_forked_child_has_them_too_and_can_make_more(pool: BlockPool) -> None:
    segment = pool.state.segment
    before = segment.readonly_mapping(0, PAGE)

    def there() -> tuple[bytes, bytes, int]:
        after = segment.readonly_mapping(PAGE, PAGE)
        private = segment.private_mapping(0, PAGE)
        return (before[:4], private[:4], len(after))

    assert run_in_fork(there) == (b"SHMB", b"SHMB", PAGE)


def test_a_child_that_became_another_user_can_make_more(pool: BlockPool) -> None:
    """The pool's file could not be opened again by it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    def there() -> bytes:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        return pool.state.segment.readonly_mapping(0, PAGE)[:4]

    assert run_in_fork(there) == b"SHMB"


def test_a_forked_child_has_no_description_of_its_own_that_it_mapped(pool: BlockPool) -> None:
    segment = pool.state.segment
    assert segment.mapped_fd >= 0
    assert run_in_fork(lambda: segment.mapped_fd) == -1


@pytest.mark.parametrize("how", ["now", "background", "off"])
def test_read_only_mappings_are_mapped_ahead_as_the_segment_is(segment: Segment, how: str) -> None:
    segment.prefault(how)
    readonly = segment.readonly_mapping(0, SIZE)
    wait_until(lambda: all(each.is_over for each in segment._prefaults), "all is mapped")
    assert len(segment._prefaults) == (2 if how == "background" else 0)
    assert bytes(readonly) == bytes(SIZE)


def flags_of(inode: int) -> list[set[str]]:
    """The kernel's flags of each mapping of that file (proc_pid_smaps(5), VmFlags)."""
    with open("/proc/self/smaps") as file:
        parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", file.read())
    return [
        set(re.findall(r"VmFlags: (.*)", part)[0].split())
        for part in parts
        if part.split()[4:5] == [str(inode)]
    ]


def test_no_mapping_of_a_pool_is_in_a_core_dump(pool: BlockPool) -> None:
    segment = pool.state.segment
    kept = [segment.readonly_mapping(0, PAGE), segment.private_mapping(0, PAGE)]
    found = flags_of(os.stat(path_of(pool.name)).st_ino)
    assert len(found) > len(kept)
    assert all("dd" in flags for flags in found)
