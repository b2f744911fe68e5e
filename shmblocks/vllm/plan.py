"""What a scheduler tells its workers to do in one step; it travels with vLLM's own output."""

from __future__ import annotations

from dataclasses import dataclass, field

from shmblocks._state.cache_state import ClaimAnswer


@dataclass(frozen=True)
class Save:
    """An item to publish once it is encoded. `claim`: to end if that does not happen."""

    key: bytes
    claim: ClaimAnswer | None


@dataclass
class StepPlan:
    """By identifier of the item.

    loads      a ticket for each rank: leases that the scheduler has taken, and gives away
    saves      items that this step encodes, and nobody has published
    republish  items that the engine's own encoder cache has and the pool has not: key of each
    """

    loads: dict[str, list[bytes]] = field(default_factory=dict)
    saves: dict[str, Save] = field(default_factory=dict)
    republish: dict[str, bytes] = field(default_factory=dict)
