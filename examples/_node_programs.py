"""What runs on the two nodes of launch_nodes.py; the models are those of launch.py.

    python _node_programs.py encoder NAME OPTIONS         node 1: photographs in, handles out
    python _node_programs.py language NAME ADDRESS OPTIONS    node 2: handles in, tokens out

Each is told lines and tells lines, one JSON value each; handles travel as text, embeddings only
from pool to pool. Between the two nodes stands `shmblocks serve`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from _models import LanguageConfig, VisionConfig
from _photos import PHOTOS, Photo
from _processes import Answerer, Encoder, Settings, same_arithmetic_everywhere
from shmblocks import BlockHandle, BlockPool, PoolConfig, multimodal_fields
from shmblocks.nodes import RemotePool
from shmblocks.nodes.address import parse_address

SMALL_VISION = VisionConfig(width=64, heads=4, mlp=128, out=128)
SMALL_LANGUAGE = LanguageConfig(hidden=128, heads=2, kv_heads=1, head=32, mlp=128, vocab=512)
# Asks a program how many blocks of its pool are free.
BLOCKS = "blocks"
# What an encoder says before it begins, so that it can be killed just then.
ENCODING = "encoding"
_BLOCK = 64


class Options(msgspec.Struct, frozen=True):
    """What all programs of a run agree on; travels as JSON on their command lines."""

    small: bool
    seed: int
    new_tokens: int
    key_file: str
    timeout: float

    def settings(self, pool_name: str) -> Settings:
        return Settings(
            pool_name=pool_name,
            vision=SMALL_VISION if self.small else VisionConfig(),
            language=SMALL_LANGUAGE if self.small else LanguageConfig(),
            seed=self.seed,
            new_tokens=self.new_tokens,
            timeout=self.timeout,
        )

    def config(self) -> PoolConfig:
        """Of both pools: fields and block size must be the same, the sizes need not."""
        hidden = self.settings("").language.hidden
        return PoolConfig(
            total_tokens=64 * _BLOCK, fields=multimodal_fields(hidden), block_size=_BLOCK
        )

    def photo(self, number: int) -> Photo:
        photo = PHOTOS[number % len(PHOTOS)]
        return photo.shrunk(by=4) if self.small else photo


class Told(msgspec.Struct, frozen=True):
    """What node 2 says of one image."""

    tokens: tuple[int, ...]
    checksum: int
    num_tokens: int
    num_bytes: int
    fetch_ms: float


def encoder(name: str, options: Options) -> None:
    """Number of a photograph -> `ENCODING`, then [handle, milliseconds of encoding]."""
    encode = Encoder(options.settings(name))
    # Whoever comes first makes the pool; the sidecar keeps it when this process is killed.
    with BlockPool.ensure(name, options.config(), role="encoder") as pool:
        say("ready")
        for photo_number in heard(pool):
            photo = options.photo(int(photo_number))
            say(ENCODING)
            started = time.perf_counter()
            prompt = encode(photo)
            encode_ms = (time.perf_counter() - started) * 1e3
            with pool.reserve(len(prompt.fill_ids), req_id=photo.name) as reservation:
                reservation["input_embeddings"].copy_(prompt.input_embeddings)
                reservation["fill_ids"].copy_(prompt.fill_ids)
                reservation["mrope_positions"].copy_(prompt.mrope_positions)
                reservation.aux[0] = len(prompt.fill_ids)
                reservation.aux[1] = prompt.mrope_position_delta
                say([reservation.publish().encode().hex(), encode_ms])


def language(name: str, address: str, options: Options) -> None:
    """Handle of node 1's pool -> `Told`."""
    settings = options.settings(name)
    answer = Answerer(settings)
    key = Path(options.key_file).read_bytes()
    with (
        BlockPool.create(name, options.config(), role="language") as pool,
        RemotePool(pool, parse_address(address), key=key) as node1,
    ):
        say("ready")
        for text in heard(pool):
            handle = BlockHandle.decode(bytes.fromhex(text))
            started = time.perf_counter()
            local = node1.fetch(handle, timeout=options.timeout)
            fetch_ms = (time.perf_counter() - started) * 1e3
            with pool.open(local) as lease:
                # In place: these are the pool's rows.
                given = answer(
                    lease["input_embeddings"], lease["mrope_positions"], int(lease.aux[1])
                )
                num_bytes = lease.handle.num_tokens * pool.config.token_bytes
            told = Told(given.tokens, given.checksum, local.num_tokens, num_bytes, fetch_ms)
            say(msgspec.to_builtins(told))


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def heard(pool: BlockPool) -> Iterator[str]:
    """What the launcher says, until it has no more to say. `BLOCKS` is answered here."""
    for line in iter(sys.stdin.readline, ""):
        value = str(json.loads(line))
        if value == BLOCKS:
            say(pool.available_blocks())
        else:
            yield value


def main() -> None:
    same_arithmetic_everywhere()
    what, name, *more = sys.argv[1:]
    options = msgspec.json.decode(more[-1], type=Options)
    if what == "encoder":
        encoder(name, options)
    else:
        language(name, more[0], options)


if __name__ == "__main__":
    main()
