"""Finding consecutive zero bits in a Python int.

An int of CPython is an array of 30-bit digits and its shifts and ands run in C, so that a search
over 4,096 blocks is a handful of calls, whatever pattern the bits have.
"""

from __future__ import annotations


def find_zeros(bits: int, width: int, count: int) -> int:
    """Lowest position of `count` consecutive zeros among the low `width` bits, or -1.

    After k rounds a one at position p means: zeros at p .. p + run - 1, with `run` doubled a round.
    """
    runs = ~bits & ((1 << width) - 1)
    run = 1
    while run < count and runs:
        step = min(run, count - run)
        runs &= runs >> step
        run += step
    return (runs & -runs).bit_length() - 1


def longest_zeros(bits: int, width: int) -> int:
    """Length of the longest run of zeros among the low `width` bits."""
    runs = ~bits & ((1 << width) - 1)
    history = [(1, runs)]
    while runs:
        run, runs = history[-1]
        runs &= runs >> run
        if runs:
            history.append((2 * run, runs))
    longest, runs = history.pop()
    if not runs:
        return 0
    # Binary search: extend the longest run found by ever smaller known ones.
    while history:
        run, shorter = history.pop()
        extended = runs & (shorter >> longest)
        if extended:
            longest, runs = longest + run, extended
    return longest
