"""Advice on large pages changes nothing that a program can see."""

from __future__ import annotations

import ctypes

from shmblocks._os import hugepages


def test_memory_with_advice_holds_what_is_written() -> None:
    size = hugepages.WORTHWHILE_BYTES + 12345
    memory = (ctypes.c_char * size)()
    address = ctypes.addressof(memory)  # no page begins there
    hugepages.prefer_huge_pages(address + 1, size - 1)
    memory[0], memory[size // 2], memory[size - 1] = b"a", b"b", b"c"
    assert (memory[0], memory[size // 2], memory[size - 1]) == (b"a", b"b", b"c")


def test_small_pieces_are_left_alone() -> None:
    memory = (ctypes.c_char * 4096)()
    assert not hugepages.prefer_huge_pages(ctypes.addressof(memory), 4096)


def test_what_the_kernel_refuses_is_no_error() -> None:
    assert not hugepages.prefer_huge_pages(4096, hugepages.WORTHWHILE_BYTES)  # not mapped
