"""One program under the switches that people start Python with: the same output, no warning."""

from __future__ import annotations

import pytest

from tests.users.kit import Program

PROGRAM = """
import shmblocks.transfer, shmblocks.sglang
from shmblocks import InvalidStateError, StaleHandleError

def main():
    with (
        BlockPool.create(NAME, CONFIG) as pool,
        HandleQueue.create(QUEUE, 16, message_type=BlockHandle) as queue,
    ):
        child = os.fork()
        if child == 0:
            send(pool, queue, 3)
            sys.exit()
        print(receive(pool, queue), os.waitpid(child, 0)[1])
        handle = pool.alloc(5)
        for act, arguments in [
            (pool.open, (handle,)),
            (pool.alloc, (0,)),
            (pool.alloc, (65,)),
            (queue.put, (b"no handle",)),
            (BlockHandle.decode, (b"nonsense",)),
        ]:
            try:
                act(*arguments)
            except Exception as error:
                print(type(error).__name__)
        pool.free(handle)
        try:
            pool.free(handle)
        except StaleHandleError as error:
            print(type(error).__name__)
        print(pool.check(), people(pool), pool.available_blocks())

main()
"""
OUTPUT = (
    "3 0\nInvalidStateError\nValueError\nValueError\nTypeError\nMalformedHandleError\n"
    "StaleHandleError\n[] 1 here, 0 dead 16\n"
)


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        ((), {}),
        (("-O",), {}),
        (("-OO",), {}),
        (("-X", "dev"), {}),
        (("-W", "error"), {}),
        (("-b", "-b"), {}),
        (("-B", "-s", "-X", "utf8=0"), {"LC_ALL": "C"}),
        ((), {"PYTHONWARNINGS": "error"}),
        ((), {"PYTHONMALLOC": "debug"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else " ".join(value) or "-",
)
def test_a_program_does_the_same_under_every_switch(
    program: Program, flags: tuple[str, ...], environment: dict[str, str]
) -> None:
    assert program.run(PROGRAM, flags=flags, environment=environment) == OUTPUT


def test_a_program_that_warns_of_what_it_dropped_names_the_line_that_dropped_it(
    program: Program,
) -> None:
    told = program.run(
        """
        pool = BlockPool.create(NAME, CONFIG)
        lease = pool.open(pool.publish(pool.alloc(5)))
        del lease
        print(pool.available_blocks())
        """,
        errors=True,
    )
    assert "ResourceWarning" in told
    assert "lease was not released" in told
    assert "del lease" in told
