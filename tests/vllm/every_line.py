"""The connector's own steps, killed at every line; what must be true after.

The scheduler's steps run without torch: to fork a process that has it takes ten times as long. The
lines are those of `shmblocks.vllm`. What they call of the library below is killed at every line
by tests of its own (`tests/cache/every_line.py`).

After each death: `check()` is clean, the entry that was there is there and unchanged, one that was
being saved is there as a whole or not at all, and no lease, ticket or claim is left.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import shmblocks.vllm
from shmblocks import UNBOUNDED, BlockPool, Namespace
from shmblocks.cache import _DTYPES, _ENTRY, _MARK, FIELD, TensorCache
from shmblocks.nodes import Nodes, NodeServer
from shmblocks.testing import (
    Coverage,
    Point,
    Scope,
    assert_clean,
    assert_survives,
    kill_at_every_line,
    within,
)
from shmblocks.vllm.config import ConnectorConfig
from shmblocks.vllm.copies import HostCopies
from shmblocks.vllm.fetching import Fetches, _Wanted
from shmblocks.vllm.identity import Identity
from shmblocks.vllm.plan import Save, StepPlan
from shmblocks.vllm.scheduler import SchedulerSide
from shmblocks.vllm.worker import WorkerSide
from tests.support.naming import new_pool_name
from tests.vllm.requests import BLOCK, ROWS, WIDTH, Request, content

if TYPE_CHECKING:
    import torch

THERE, NEW = content("there"), content("new")
CONFIG = ConnectorConfig.of({"pool_bytes": 8 * BLOCK, "block_bytes": BLOCK}).pool_config()
IDENTITY = Identity(Namespace(model="tiny"), only_content_hashes=False)
SCOPE = Scope([shmblocks.vllm], library=False)
Call = Callable[[], object]
Setup = Callable[[], contextlib.AbstractContextManager["Scene"]]


def content_of(identifier: str) -> bytes:
    """The bytes of an item of 32 x 16 fp32."""
    return identifier.encode() * (ROWS * WIDTH * 4 // len(identifier))


def tensor_of(identifier: str) -> torch.Tensor:
    import torch

    data = bytearray(content_of(identifier))
    return torch.frombuffer(data, dtype=torch.float32).view(ROWS, WIDTH)


def put(pool: BlockPool, key: bytes, identifier: str) -> None:
    """What `TensorCache.put` does, without torch."""
    with pool.reserve(1) as reservation:
        data = content_of(identifier)
        reservation.memory(FIELD)[: len(data)] = data
        entry = _ENTRY.pack(_MARK, _DTYPES.index("fp32"), 2, ROWS, WIDTH, *[0] * 6)
        reservation.memory("aux")[: len(entry)] = entry
        reservation.publish(readers=UNBOUNDED, key=key)


class Scene:
    """A pool with one item. `mine`: whoever is killed attaches anew."""

    def __init__(self, survivor: BlockPool) -> None:
        self.survivor = survivor
        self.keep: list[object] = []
        # Of another node, which has the new item.
        self.server: NodeServer | None = None
        put(survivor, self.key(THERE), THERE)
        given = survivor.get_tickets(self.key(THERE), leases=2)
        # Of the scheduler, which outlives its workers here.
        self.tickets = given.tickets if given is not None else []
        self.claim = survivor.claim(self.key(NEW))

    def key(self, identifier: str) -> bytes:
        return IDENTITY.key(identifier, self.survivor.epoch)

    def attach(self) -> TensorCache:
        return TensorCache(BlockPool.attach(self.survivor.name, prefault="off"))

    def scheduler(self, *, is_producer: bool = True) -> SchedulerSide:
        return SchedulerSide(
            self.attach(),
            IDENTITY,
            lambda modality: {"image_grid_thw"},
            is_producer=is_producer,
            is_consumer=True,
            ranks=2,
            wait_seconds=0.0,
            hold_seconds=0.0,
        )

    def worker(self, *, in_place: bool = False) -> WorkerSide:
        cache = self.attach()
        return WorkerSide(cache, HostCopies(cache), rank=1, saves=True, in_place=in_place)


@contextlib.contextmanager
def one_item() -> Iterator[Scene]:
    with BlockPool.create(new_pool_name(), CONFIG, role="survivor", prefault="off") as pool:
        yield Scene(pool)


@contextlib.contextmanager
def one_item_and_torch() -> Iterator[Scene]:
    import torch

    torch.set_num_threads(1)
    with one_item() as scene:
        yield scene


@contextlib.contextmanager
def two_nodes_and_torch() -> Iterator[Scene]:
    with (
        one_item_and_torch() as scene,
        BlockPool.create(new_pool_name(), CONFIG, role="other node", prefault="off") as there,
        NodeServer(there, ("127.0.0.1", 0)) as scene.server,
    ):
        put(there, scene.key(NEW), NEW)
        scene.survivor.end_claim(scene.key(NEW))
        yield scene


class Case(NamedTuple):
    """A step, its scene, and whether the new item may be in the pool when it was killed."""

    operation: Callable[[Scene], Call]
    setup: Setup
    saves: bool


CASES: dict[str, Case] = {}


def case(
    setup: Setup = one_item, *, saves: bool = False
) -> Callable[[Callable[[Scene], Call]], Callable[[Scene], Call]]:
    def register(operation: Callable[[Scene], Call]) -> Callable[[Scene], Call]:
        CASES[operation.__name__] = Case(operation, setup, saves)
        return operation

    return register


# ---- the scheduler -----------------------------------------------------------------------------


@case()
def promise_and_plan(scene: Scene) -> Call:
    side = scene.scheduler()
    request = Request("a", THERE)

    def schedule() -> None:
        assert side.is_available(request, 0)
        assert side.has(THERE)
        side.after_alloc(request, 0)
        scene.keep.append(side.take_plan([]))

    return schedule


@case()
def promise_what_is_not_scheduled(scene: Scene) -> Call:
    side = scene.scheduler()

    def schedule() -> None:
        assert side.has(THERE)
        side.take_plan([])

    return schedule


@case()
def claim_what_is_to_be_encoded(scene: Scene) -> Call:
    side = scene.scheduler()
    scene.survivor.end_claim(scene.key(NEW))
    request = Request("a", NEW)

    def schedule() -> None:
        assert side.is_available(request, 0)
        assert not side.has(NEW)
        side.after_alloc(request, 0)
        scene.keep.append(side.take_plan([]))

    return schedule


@case()
def hold_for_a_request_without_media(scene: Scene) -> Call:
    side = scene.scheduler(is_producer=False)
    request = Request("a", THERE, media=False)

    def hold_and_abort() -> None:
        assert side.is_available(request, 0)
        side.finished(request)

    return hold_and_abort


@case()
def lose_a_request_without_media(scene: Scene) -> Call:
    side = scene.scheduler(is_producer=False)
    request = Request("a", NEW, media=False)

    def ask_and_fail() -> None:
        assert not side.is_available(request, 0)
        assert side.take_lost() == {"a"}
        side.finished(request)

    return ask_and_fail


@case()
def announce(scene: Scene) -> Call:
    side = scene.scheduler()
    return lambda: (side.may_announce(THERE), side.may_announce(NEW))


@case()
def stop_a_scheduler(scene: Scene) -> Call:
    side = scene.scheduler()
    assert side.has(THERE)
    return side.close


@case(two_nodes_and_torch, saves=True)
def fetch_from_another_node(scene: Scene) -> Call:
    """What the thread of a scheduler does."""
    assert scene.server is not None
    cache = scene.attach()
    nodes = Nodes(cache.pool, [scene.server.address])
    fetches = Fetches(cache, nodes, timeout=30.0)
    key, (node,) = scene.key(NEW), nodes.nodes

    def fetch() -> None:
        fetches._fetch(_Wanted(key, node, math.inf))
        assert cache.pool.find(key) is not None

    return fetch


# ---- a worker ----------------------------------------------------------------------------------


@case(one_item_and_torch)
def load(scene: Scene) -> Call:
    worker = scene.worker()
    return lambda: worker.load(StepPlan(loads={THERE: scene.tickets}), {})


@case(one_item_and_torch)
def load_in_place_and_drop(scene: Scene) -> Call:
    worker = scene.worker(in_place=True)
    cache: dict[str, torch.Tensor] = {}

    def load_and_drop() -> None:
        worker.load(StepPlan(loads={THERE: scene.tickets}), cache)
        del cache[THERE]
        worker.load(StepPlan(), cache)

    return load_and_drop


@case(one_item_and_torch, saves=True)
def save(scene: Scene) -> Call:
    worker = scene.worker()
    plan = StepPlan(saves={NEW: Save(scene.key(NEW), scene.claim)})

    def save_and_finish() -> None:
        worker.save(plan, NEW, {NEW: tensor_of(NEW)})
        worker.finish(plan)

    return save_and_finish


@case(one_item_and_torch)
def finish_what_was_not_saved(scene: Scene) -> Call:
    worker = scene.worker()
    plan = StepPlan(saves={NEW: Save(scene.key(NEW), scene.claim)})
    return lambda: worker.finish(plan)


@case(one_item_and_torch, saves=True)
def republish(scene: Scene) -> Call:
    worker = scene.worker()
    plan = StepPlan(republish={NEW: scene.key(NEW)})
    return lambda: worker.republish(plan, {NEW: tensor_of(NEW)})


@case(one_item_and_torch)
def stop_a_worker(scene: Scene) -> Call:
    worker = scene.worker(in_place=True)
    cache: dict[str, torch.Tensor] = {}
    scene.keep.append(cache)
    worker.load(StepPlan(loads={THERE: scene.tickets}), cache)
    return worker.close


def kill(name: str) -> Coverage:
    """Kill a step at every line."""
    case = CASES[name]

    def verify(scene: Scene, point: Point) -> None:
        pool = scene.survivor
        assert_survives(pool)
        with within(1.0, "the survivor's next operation"):
            pool.reap()
        assert_clean(pool, "after a reap")
        # What the survivor, as the scheduler, still has.
        for ticket in scene.tickets:
            pool.revoke(ticket)
        pool.end_claim(scene.key(NEW), scene.claim)
        assert pool.stats().leases == 0
        assert pool.cache_stats().claims == 0
        _holds(pool, scene.key(THERE), THERE)
        if pool.find(scene.key(NEW)) is not None:
            assert case.saves
            _holds(pool, scene.key(NEW), NEW)
        pool.drop_all()
        assert pool.available_blocks() == pool.config.total_blocks

    return kill_at_every_line(case.setup, case.operation, verify, scope=SCOPE)


def _holds(pool: BlockPool, key: bytes, identifier: str) -> None:
    (lease,) = pool.get(key) or []
    with lease:
        data = content_of(identifier)
        assert bytes(lease.memory(FIELD)[: len(data)]) == data
