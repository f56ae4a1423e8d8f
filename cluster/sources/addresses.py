"""Checks of the network addresses that a URI from a manifest may lead to."""

from __future__ import annotations

import ipaddress

from gare.errors import FetchError

#: Addresses outside the link-local range at which clouds hand out credentials: AWS (IPv6), Azure, Alibaba.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "168.63.129.16", "100.100.100.200")))
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
    if not ip.is_global and not private:
        raise FetchError(
            f"leads to {ip}, an address of this machine or a private network",
            where=where,
            accepted="a public server, or sources.private_addresses=true",
        )


def _reached(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns the IPv4 address that is embedded in some IPv6 addresses."""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        return ip.ipv4_mapped or ip.sixtofour or ip
    return ip
