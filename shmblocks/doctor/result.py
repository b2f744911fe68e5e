"""What one check of the doctor found: data, to be shown or decided on by whoever asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from shmblocks.doctor.host import Host

Status = Literal["ok", "warn", "fail", "skip"]


class CheckResult(msgspec.Struct, frozen=True):
    """The outcome of one check.

    name     stable, for machines: `shm-size`, `ofd-locks`
    status   ok: nothing to do; warn: works, with a limit that one should know;
             fail: pools do not work here, or not the part that the check is about;
             skip: does not apply to this machine, or cannot be told here
    found    what was seen
    advice   what to do about it; empty where there is nothing to do
    """

    name: str
    status: Status
    found: str
    advice: str = ""


# Yields one result per fact it looked at. It changes nothing on the machine that outlives it.
Check = Callable[[Host], Iterator[CheckResult]]
