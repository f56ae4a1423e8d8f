"""Where a URI from somebody's manifest may lead, itself and by redirects and names."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.remote import RemoteVideos
from cluster.sources.addresses import check_address
from gare.config import SourcesConfig
from gare.data.sources import LocalVideos
from gare.errors import FetchError
from tests.servers import Site

NEVER = [
    "169.254.169.254",
    "fe80::1%eth0",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "fd00:ec2::254",
    "168.63.129.16",
    "100.100.100.200",
    "0.0.0.0",
    "::",
    "224.0.0.1",
]
PRIVATE = [
    "127.0.0.1",
    "::1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "fd12::1",
    "::ffff:127.0.0.1",
]


def videos(*, private: bool) -> RemoteVideos:
    return RemoteVideos(SourcesConfig(backoff_s=0, retries=0, private_addresses=private), LocalVideos())


def fault(source: RemoteVideos, uri: str) -> str:
    with pytest.raises(FetchError) as caught, source.open(uri):
        raise AssertionError("it was opened")
    return str(caught.value)


@pytest.mark.parametrize("address", NEVER)
def test_metadata_services_are_never_asked(address: str) -> None:
    """They hand out the machine's credentials to whoever asks from it."""
    for private in (False, True):
        with pytest.raises(FetchError, match="link-local, metadata or multicast"):
            check_address(address, private=private, where="")


@pytest.mark.parametrize("address", PRIVATE)
def test_private_networks_are_asked_when_that_is_wanted(address: str) -> None:
    """Services of a cluster trust whoever is inside; a manifest from outside must not use that unasked."""
    check_address(address, private=True, where="")
    with pytest.raises(FetchError, match="private network"):
        check_address(address, private=False, where="")


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_servers_are_asked(address: str) -> None:
    """Else nothing could be fetched by default."""
    check_address(address, private=False, where="")


def test_redirects_are_held_to_the_same_rules(site: Site) -> None:
    """An innocent URL that answers with another place is the usual way around such rules."""
    places = {
        "http://169.254.169.254/latest/meta-data/": "link-local",
        "file:///etc/passwd": "the scheme 'file'",
        "http://[::ffff:169.254.169.254]/": "link-local",
        "ftp://host/a": "the scheme 'ftp'",
        "http://me:secret@host/": "holds a name or password",
        "http://[broken": "is not a URL",
    }
    for place, words in places.items():
        site.redirects["/a.mp4"] = place
        message = fault(videos(private=True), f"{site.url}/a.mp4")
        assert words in message
        assert "secret" not in message
    assert "names no host" in fault(videos(private=True), "http:///a.mp4")
    site.redirects["/a.mp4"] = "/a.mp4"
    assert "more than 5 times" in fault(videos(private=True), f"{site.url}/a.mp4")


def test_redirects_are_followed(site: Site) -> None:
    """Most public collections answer with the place where a file lies today."""
    site.redirects = {"/a": "/b", "/b": f"{site.url}/c.mp4?x=1"}
    site.files["/c.mp4"] = b"video"
    with videos(private=True).open(f"{site.url}/a") as video:
        assert Path(video.path).read_bytes() == b"video"


def test_names_are_judged_by_where_they_lead(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that looks public and resolves to this machine is asked nothing, however often it changes."""
    original = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **named: Any) -> Any:
        return original("127.0.0.1" if host == "videos.example.org" else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    site.files["/a.mp4"] = b"video"
    uri = site.url.replace("127.0.0.1", "videos.example.org") + "/a.mp4?token=hush"
    message = fault(videos(private=False), uri)
    assert message.startswith(f"{uri.partition('?')[0]}: leads to 127.0.0.1")
    assert "sources.private_addresses=true" in message
    assert site.asked == []
    with videos(private=True).open(uri) as video:
        assert video.size_bytes == 5
