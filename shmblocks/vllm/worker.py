"""A worker's side: adopts what the scheduler has promised, and publishes what was encoded.

    republish   what the engine's cache has and the pool has not
    load        adopt the ticket of this rank, and give the engine a copy, or the pool's own memory
    save        what this step has encoded goes into the pool
    finish      claims of what was not saved end, so that nobody waits for it

Contract
- Only a broken promise raises, in `load`; it stops the engine with an error that says why. Nothing
  that goes wrong with a save is more than a log line: the item stays in this instance.
- All ranks load; one of them saves, since all have the same outputs.
- In place, the lease lasts as long as the engine's cache has that tensor: it is released in the
  first step after the engine dropped it.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from shmblocks.cache import CacheLease, TensorCache
from shmblocks.errors import ShmBlocksError
from shmblocks.vllm.copies import Copies
from shmblocks.vllm.plan import StepPlan
from shmblocks.vllm.tally import Tally

if TYPE_CHECKING:
    import torch

    EncoderCache = dict[str, torch.Tensor]

_log = logging.getLogger("vllm.ec.shmblocks")


class WorkerSide:
    """One rank of one instance. Borrows the cache, whose pool must be this side's own."""

    def __init__(
        self, cache: TensorCache, copies: Copies, *, rank: int, saves: bool, in_place: bool
    ) -> None:
        """`rank`: which ticket is ours. `saves`: this rank is the one that publishes."""
        self._cache = cache
        self._copies = copies
        self._rank = rank
        self._saves = saves
        self._in_place = in_place
        self.tally = Tally()
        self._kept: dict[str, tuple[torch.Tensor, CacheLease]] = {}
        self._saved: set[str] = set()

    # ---- loading -------------------------------------------------------------------------------

    def load(self, plan: StepPlan, encoder_cache: EncoderCache) -> None:
        """Put every promised item into the engine's cache."""
        self._release_dropped(encoder_cache)
        for identifier, tickets in plan.loads.items():
            begun = time.perf_counter()
            lease = self._copies.adopt(tickets[self._rank])
            if identifier in encoder_cache:
                # It left the engine's cache and came again in one pass: the tensor is still there.
                lease.release()
                continue
            if self._in_place:
                encoder_cache[identifier] = tensor = lease.tensor
                self._kept[identifier] = (tensor, lease)
            else:
                encoder_cache[identifier] = tensor = self._copies.load(lease)
            self.tally.add("loads")
            self.tally.add("load_bytes", tensor.numel() * tensor.element_size())
            self.tally.add("load_seconds", time.perf_counter() - begun)
        self._copies.join()

    def _release_dropped(self, encoder_cache: EncoderCache) -> None:
        for identifier, (tensor, lease) in list(self._kept.items()):
            if encoder_cache.get(identifier) is not tensor:
                del self._kept[identifier]
                lease.release()

    # ---- saving --------------------------------------------------------------------------------

    def republish(self, plan: StepPlan, encoder_cache: EncoderCache) -> None:
        """Put items into the pool that the engine has encoded before."""
        for identifier, key in plan.republish.items():
            if self._saves and identifier in encoder_cache:
                self._put(identifier, key, encoder_cache[identifier])

    def save(self, plan: StepPlan, identifier: str, encoder_cache: EncoderCache) -> None:
        """Put an item into the pool, if this step was to encode it."""
        save = plan.saves.get(identifier)
        if save is None or not self._saves or identifier not in encoder_cache:
            return
        if self._put(identifier, save.key, encoder_cache[identifier]):
            self._saved.add(identifier)

    def _put(self, identifier: str, key: bytes, tensor: torch.Tensor) -> bool:
        """Whether the key has an entry now."""
        begun = time.perf_counter()
        try:
            if self._copies.save(key, tensor):
                self.tally.add("saves")
                self.tally.add("save_bytes", tensor.numel() * tensor.element_size())
                self.tally.add("save_seconds", time.perf_counter() - begun)
                return True
            if self._cache.pool.find(key) is not None:
                return True  # another instance was faster
            self.tally.add("no_room")
        except (ShmBlocksError, ValueError, RuntimeError) as error:
            # (torch raises RuntimeError, and ValueError is a dtype that a pool does not hold.)
            _log.warning("item %s stays in this instance: %s", identifier, error)
        return False

    def finish(self, plan: StepPlan) -> None:
        """The step is over."""
        saved, self._saved = self._saved, set()
        for identifier, save in plan.saves.items():
            if not self._saves or save.claim is None or identifier in saved:
                continue
            try:
                self._cache.pool.end_claim(save.key, save.claim)
            except ShmBlocksError as error:
                _log.warning("item %s stays claimed for now: %s", identifier, error)

    def close(self) -> None:
        """Release what is in place, and leave the pool. Idempotent.

        The engine's tensors stay readable.
        """
        for _, lease in self._kept.values():
            lease.release()
        self._kept.clear()
        self._cache.pool.close()
