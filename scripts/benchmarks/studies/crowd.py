"""Several processes that do the same thing at the same time, for so many seconds.

Each makes its work, all wait for each other, and each counts what it did and how long the longest
single time took. Used where not one message but many processes are of interest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

# Seconds for the processes to be there, and for their answers behind the measured time.
PATIENCE = 60.0

Step = Callable[[], None]
# Makes the work in its process: the step that is repeated, and what to call at the end.
Make = Callable[[], tuple[Step, Callable[[], None]]]


class Share(NamedTuple):
    """What one process did."""

    steps: int
    longest: float
    seconds: float


def crowd(context: ForkServerContext, makes: list[Make], seconds: float) -> list[Share]:
    """One process for each of `makes`; what each of them did."""
    barrier = context.Barrier(len(makes))
    pipes = [context.Pipe(duplex=False) for _ in makes]
    processes = [
        context.Process(target=_work, args=(make, barrier, seconds, answer), daemon=True)
        for make, (_, answer) in zip(makes, pipes, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        shares = []
        for (answers, answer), process in zip(pipes, processes, strict=True):
            answer.close()
            if not answers.poll(2 * PATIENCE + seconds):
                raise TimeoutError(f"{process.name} did not answer")
            shares.append(Share(*answers.recv()))
        return shares
    finally:
        for process in processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        for answers, _ in pipes:
            answers.close()


def _work(make: Make, barrier: Barrier, seconds: float, answer: object) -> None:
    step, close = make()
    for _ in range(50):
        step()
    barrier.wait(PATIENCE)
    now = time.perf_counter
    start = last = now()
    end = start + seconds
    steps, longest = 0, 0.0
    while last < end:
        step()
        moment = now()
        longest = max(longest, moment - last)
        last = moment
        steps += 1
    barrier.wait(PATIENCE)
    close()
    answer.send((steps, longest, last - start))  # type: ignore[attr-defined]


def per_second(shares: list[Share]) -> float:
    """Steps of all together."""
    return sum(share.steps / share.seconds for share in shares)


def unfairness(shares: list[Share]) -> float:
    """The largest share against the smallest."""
    steps = [share.steps for share in shares]
    return max(steps) / max(1, min(steps))
