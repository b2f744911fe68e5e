"""Which interface an address is of."""

from __future__ import annotations

import socket
import subprocess

import pytest

from shmblocks.nodes.devices import device_of


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_is_lo(host: str) -> None:
    assert device_of(host) == "lo"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "203.0.113.77", "2001:db8::77"])
def test_what_no_single_interface_has_is_none(host: str) -> None:
    assert device_of(host) is None


def test_an_address_of_this_machine_is_of_the_interface_that_has_it() -> None:
    try:
        told = subprocess.run(
            ["ip", "-o", "addr", "show", "scope", "global"], capture_output=True, text=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("needs `ip`")
    # `2: eth0    inet 10.0.0.5/24 ...`; the first of each interface and kind.
    found: dict[tuple[str, str], str] = {}
    for line in told.splitlines():
        _, name, kind, address, *_ = line.split()
        found.setdefault((name, kind), address.partition("/")[0])
    if not found:
        pytest.skip("this machine has no address but loopback")
    names = {name for _, name in socket.if_nameindex()}
    for (name, _), address in found.items():
        plain = name.partition("@")[0]
        assert plain in names
        assert device_of(address) == plain
