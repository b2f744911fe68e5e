"""The table of statuses, and the one function that moves along it."""

from __future__ import annotations

import itertools

import pytest

from shmblocks import InvalidStateError
from shmblocks.transfer import Status
from shmblocks.transfer.room import TABLE, move


def test_the_statuses_are_those_of_the_original() -> None:
    names = ["Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed"]
    assert [status.name for status in Status] == names
    assert [str(status) for status in Status] == names
    assert set(TABLE) == set(Status)


def test_every_status_is_reached_from_the_first_and_every_open_one_can_fail() -> None:
    reached = {Status.Bootstrapping}
    for status, following in itertools.product(Status, Status):
        if following in TABLE[status]:
            reached.add(following)
    assert reached == set(Status)
    for status in Status:
        assert status.is_final or Status.Failed in TABLE[status]


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("to", Status)
def test_a_move_is_allowed_exactly_when_the_table_says_so(status: Status, to: Status) -> None:
    if to in TABLE[status]:
        assert move(status, to) is to
    else:
        with pytest.raises(InvalidStateError, match=f"at {status} cannot go to {to}"):
            move(status, to)


@pytest.mark.parametrize("status", [Status.Success, Status.Failed])
def test_an_ended_room_goes_nowhere(status: Status) -> None:
    assert status.is_final
    with pytest.raises(InvalidStateError, match="nothing: it has ended"):
        move(status, Status.Transferring)
