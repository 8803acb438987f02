"""Which network interface has an address: what Gloo must be told where a host's name leads to its loopback."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # netdevice(7)
_NAME_BYTES = 16


def interface_of(address: str) -> str | None:
    """The name of the interface with this IPv4 address; None where none has it, or the kernel does not tell."""
    address = address.removeprefix("::ffff:")  # as a socket of both families shows it
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[: _NAME_BYTES - 1])
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None
