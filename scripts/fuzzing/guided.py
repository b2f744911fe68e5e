"""The coverage-guided fuzzer: atheris looks for bytes that reach lines no other bytes have reached.

    scripts/fuzz --guided 100000

It needs `pip install atheris` (there is no wheel of it for every Python). The first byte of an
input says where the rest goes: to a pool, as an encoded handle, or to an endpoint of a transfer,
as a message. What is right is what is right in handles.py and messages.py.
"""

from __future__ import annotations

import argparse
import queue
import random
import sys
import warnings
from pathlib import Path

import atheris

# Before shmblocks is imported: only instrumented modules guide the search.
with atheris.instrument_imports(include=["shmblocks"]):
    import torch

    from fuzzing.handles import CONFIG, Scene
    from shmblocks import BlockHandle, BlockPool, MalformedHandleError
    from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint

LONGEST = 128
# Messages to one pair of endpoints before it is made anew.
PER_PAIR = 200


class Target:
    """One pool with a scene for handles, and one with a pair of endpoints."""

    def __init__(self, name: str, seed: int) -> None:
        self._random = random.Random(seed)
        self._pool = BlockPool.create(name, CONFIG, prefault="off")
        self._pairs = BlockPool.create(f"{name}-pairs", CONFIG, prefault="off")
        self._scene = Scene(self._pool)
        self._left = 0
        self._there: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._back: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._ends: list[EmbeddingEndpoint | LanguageEndpoint] = []

    def seeds(self) -> list[bytes]:
        """Right handles and messages to start from."""
        self._meet()
        messages = [self._there.get_nowait() for _ in range(self._there.qsize())]
        return [*(b"h" + data for data in self._scene.encoded), *(b"m" + each for each in messages)]

    def __call__(self, data: bytes) -> None:
        if data[:1] == b"h":
            self._use_handle(data[1:])
        else:
            self._send(data[1:])

    def _use_handle(self, data: bytes) -> None:
        try:
            handle = BlockHandle.decode(data)
        except MalformedHandleError:
            return
        self._scene.use(handle, self._random)

    def _send(self, data: bytes) -> None:
        if self._left == 0:
            self._meet()
        self._left -= 1
        (self._there if self._left % 2 else self._back).put(data)
        for end in self._ends:
            end.poll()

    def _meet(self) -> None:
        """A new pair of endpoints with a transfer between them; the last one's blocks are back."""
        for end in self._ends:
            end.close()
        if self._pairs.available_blocks() != CONFIG.total_blocks:
            raise AssertionError(f"blocks are lost: {self._pairs.allocations()}")
        self._there, self._back = queue.SimpleQueue(), queue.SimpleQueue()
        sending = EmbeddingEndpoint(self._pairs, self._there, self._back)
        receiving = LanguageEndpoint(self._pairs, self._back, self._there)
        receiving.receive(1, mode=self._random.choice(("landing", "push")))
        sending.send(1, {"stamp": torch.arange(200, dtype=torch.int64)})
        self._ends = [sending, receiving]
        self._left = PER_PAIR


def main() -> None:
    """Ends with 0 when nothing was found, else with libFuzzer's code and the input in a file.

    It ends on the spot. The pools and the corpus stay: the caller removes them.
    """
    parser = argparse.ArgumentParser(prog="python -m fuzzing.guided", description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", required=True, help="of the pools")
    parser.add_argument("--corpus", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ResourceWarning)
    torch.set_num_threads(1)
    target = Target(options.name, options.seed)
    for number, data in enumerate(target.seeds()):
        (options.corpus / str(number)).write_bytes(data)
    settings = [f"-runs={options.runs}", f"-seed={options.seed}", f"-max_len={LONGEST}"]
    atheris.Setup([sys.argv[0], *settings, str(options.corpus)], target)
    atheris.Fuzz()  # never returns


if __name__ == "__main__":
    main()
