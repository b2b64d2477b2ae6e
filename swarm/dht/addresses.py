"""Under which addresses others reach this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

_ANYWHERE = ("192.0.2.1", "2001:db8::1")  # documentation addresses (RFC 5737, RFC 3849)


def own_host(host: str, peers: Sequence[str]) -> str:
    """The address to announce for a port on `host`: itself, unless that means all interfaces.

    Then it is that of the interface towards the first peer; nothing is sent to find out.
    """
    address = ipaddress.ip_address(host) if _is_ip(host) else None
    if address is None or not address.is_unspecified:
        return host
    family = f"ip{address.version}"
    towards = [found[1] for peer in peers if (found := re.match(rf"/{family}/([^/]+)/", peer))]
    for target in [*towards, _ANYWHERE[address.version == 6]]:
        kind = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
            except OSError:  # no route there
                continue
            return str(probe.getsockname()[0])
    return "::1" if address.version == 6 else "127.0.0.1"


def joinable_at(host: str, visible: Sequence[str]) -> list[str]:
    """Multiaddrs to hand out: those under the announced host first, loopback only if alone.

    `visible` are the DHT daemon's own addresses, whose host may not be known outside (NAT).
    """
    kind = f"ip{ipaddress.ip_address(host).version}" if _is_ip(host) else "dns"
    ports = {text.split("/", 3)[3] for text in visible}
    announced = [f"/{kind}/{host}/{rest}" for rest in sorted(ports)]
    others = [text for text in visible if "/127.0.0.1/" not in text and "/::1/" not in text]
    return list(dict.fromkeys([*announced, *others]))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
