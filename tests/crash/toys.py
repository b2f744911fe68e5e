"""Operations for the tests of the harness itself: some right, some wrong on purpose."""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path


class Account:
    """Two words of shared memory, whose sum must stay 0."""

    def __init__(self) -> None:
        self.words = memoryview(mmap.mmap(-1, 64)).cast("q")

    @property
    def is_whole(self) -> bool:
        return self.words[0] + self.words[1] == 0


@contextlib.contextmanager
def account() -> Iterator[Account]:
    yield Account()


def move_at_once(scene: Account) -> Callable[[], None]:
    def move() -> None:
        five = struct.pack("=2q", 5, -5)
        scene.words[:2] = memoryview(five).cast("q")
        del five

    return move


def move_in_two_steps(scene: Account) -> Callable[[], None]:
    def move() -> None:
        scene.words[0] += 5
        scene.words[1] -= 5

    return move


def move_with_much_in_between(scene: Account) -> Callable[[], None]:
    """Changes what is shared at two of its lines, and computes at the others."""

    def move() -> None:
        total = 0
        for number in (1, 2, 3):
            total += number
        scene.words[0] += total
        total = -total
        scene.words[1] += total

    return move


def name_and_unname(name: str) -> Callable[[Account], Callable[[], None]]:
    """Makes a name in /dev/shm, and removes it."""

    def operation(_: Account) -> Callable[[], None]:
        def make_and_remove() -> None:
            path = Path("/dev/shm", name)
            path.touch()
            path.name.encode()
            path.unlink()

        return make_and_remove

    return operation


def move_and_mend(scene: Account) -> Callable[[], None]:
    """Right when interrupted, wrong when killed."""

    def move() -> None:
        before = bytes(scene.words[:2])
        try:
            scene.words[0] += 5
            scene.words[1] -= 5
        except BaseException:
            scene.words[:2] = memoryview(before).cast("q")
            raise

    return move


def move_and_hide(scene: Account) -> Callable[[], None]:
    """Swallows what interrupts it."""

    def move() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            scene.words[2] += 1

    return move


def move_differently_each_time(scene: Account) -> Callable[[], None]:
    """Has other lines in each run."""

    def move() -> None:
        for _ in range(_runs[0]):
            scene.words[2] += 1

    _runs[0] += 1
    return move


_runs = [1]
