"""Checks of the network addresses that a URI from a manifest may lead to."""

from __future__ import annotations

import ipaddress

from gare.errors import FetchError

#: Addresses outside the link-local range at which clouds hand out credentials: AWS and Google (IPv6), Azure,
#: Alibaba, Oracle.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        ("fd00:ec2::254", "fd20:ce::254", "168.63.129.16", "100.100.100.200", "192.0.0.192"),
    )
)
#: What is not public, by IANA's registries of special-purpose addresses (2025-10). Python's own list differs
#: from version to version: 3.11.7 takes fec0::/10, 192.0.0.0/24 and 3fff::/20 for public.
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
)
#: All that IPv6 has of public addresses; and what is not public in it: protocols, documentation.
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_address(host: str) -> bool:
    """Returns True if a host is written as an IP address."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def check_address(address: str, *, private: bool, where: str) -> None:
    """Refuses addresses that a video cannot legitimately come from.

    Args:
        address: address of the server that is about to be connected to, not a name, which could resolve anew.
        private: True to allow this machine and private networks.
        where: the fetched URI in the form that may be shown.

    Raises:
        FetchError: for link-local, metadata, multicast, unspecified and reserved IPv6 addresses, and without
            ``private`` for all that are not public.
    """
    ip = _reached(ipaddress.ip_address(address.partition("%")[0]))
    # IPv6's reserved ranges hold ::127.0.0.1, an old notation of IPv4's, and nothing that is assigned.
    is_reserved = ip.version == 6 and ip.is_reserved and not ip.is_loopback
    if ip.is_link_local or ip in _METADATA or ip.is_multicast or ip.is_unspecified or is_reserved:
        raise FetchError(
            f"leads to {ip}, a link-local, metadata or multicast address",
            where=where,
            accepted="a public server",
        )
    if not private and not _is_public(ip):
        raise FetchError(
            f"leads to {ip}, an address of this machine or a private network",
            where=where,
            accepted="a public server, or sources.private_addresses=true",
        )


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _NOT_PUBLIC_V4)
    return ip in _PUBLIC_V6 and not any(ip in network for network in _NOT_PUBLIC_V6)


def _reached(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns the IPv4 address that is embedded in some IPv6 addresses."""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)
    return ip
