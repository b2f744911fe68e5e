"""A `HandleQueue` under the endpoints of a transfer, seen from the queue's side.

tests/transfer runs the whole conformance suite of transfers over it, in threads and processes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shmblocks import BlockPool, HandleQueue
from shmblocks.transfer import LanguageEndpoint, Status
from tests.queue.kit import asleep
from tests.transfer.kinds import End
from tests.transfer.kit import (
    LANDING,
    MODES,
    PATIENCE,
    Mode,
    assert_arrived,
    assert_nothing_held,
    config,
    send_the_rest,
)
from tests.transfer.partner import PartnerThread

LENGTHS = (1, LANDING, 3 * LANDING + 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("capacity", [1, 64])
def test_every_message_of_a_transfer_goes_through_and_nobody_is_left_asleep(
    new_pool_name: Callable[[], str], mode: Mode, capacity: int
) -> None:
    with (
        BlockPool.create(new_pool_name(), config(), prefault="off") as pool,
        HandleQueue.create(new_pool_name(), capacity) as there,
        HandleQueue.create(new_pool_name(), capacity) as back,
    ):
        with (
            PartnerThread(pool, "embedding", End(there, back)) as partner,
            LanguageEndpoint(pool, back, there) as language,
        ):
            for room, length in enumerate(LENGTHS):
                receiver = language.receive(room, mode)
                partner.ask("start", room, num_tokens=length)
                with receiver.wait(PATIENCE) as result:
                    assert_arrived(result, pool, length)
                send_the_rest(language)
                assert partner.ask("until", room).status == Status.Success
        assert asleep(there) == asleep(back) == (0, 0)
        assert_nothing_held(pool)
