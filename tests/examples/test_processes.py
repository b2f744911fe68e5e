"""A process of the example that loses its partner: an error, or the launcher ending all of them."""

from __future__ import annotations

import multiprocessing

import pytest

from _processes import quiet_when_all_end
from shmblocks import PeerDiedError


def test_losing_a_partner_is_an_error_while_the_launcher_is_there() -> None:
    ours, theirs = multiprocessing.Pipe()
    with pytest.raises(PeerDiedError), quiet_when_all_end(theirs):
        raise PeerDiedError("the language side died")
    ours.close()
    theirs.close()


def test_losing_a_partner_is_an_end_when_the_launcher_ends_all() -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    with pytest.raises(SystemExit), quiet_when_all_end(theirs):
        raise PeerDiedError("the language side died")
    theirs.close()
