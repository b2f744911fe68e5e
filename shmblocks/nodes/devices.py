"""Which network interface an address is of: for libraries that take interfaces, not addresses.

What it does not do: know other addresses of an interface than its first one of IPv4.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

LOOPBACK = "lo"
_SIOCGIFADDR = 0x8915
_NAME_BYTES = 16
# Where the address stands in what the kernel answers: behind the name, a family and a port.
_ADDRESS_AT = 20
_IFREQ_BYTES = 256


def device_of(host: str) -> str | None:
    """The name of the interface with this numeric address; None: no one has it alone (0.0.0.0), or
    it is not found."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_loopback:
        return LOOPBACK
    if address.is_unspecified:
        return None
    if address.version == 4:
        return _device_of_ipv4(address.packed)
    return _device_of_ipv6(address.packed.hex())


def _device_of_ipv4(packed: bytes) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_IFREQ_BYTES}s", name.encode()[: _NAME_BYTES - 1])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no address
            if answer[_ADDRESS_AT : _ADDRESS_AT + 4] == packed:
                return name
    return None


def _device_of_ipv6(packed: str) -> str | None:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[-1] for line in lines if line.startswith(packed)), None)
