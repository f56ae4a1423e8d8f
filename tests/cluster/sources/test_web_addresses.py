"""Where a URI from somebody's manifest may lead, itself and by redirects and names."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.sources.addresses import check_address
from cluster.sources.fetch import RemoteVideos
from gare.config import SourcesConfig
from gare.data.videos import LocalVideos
from gare.errors import FetchError
from tests.helpers.servers import Site

NEVER = [
    "169.254.169.254",
    "fe80::1%eth0",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "fd00:ec2::254",
    "fd20:ce::254",
    "168.63.129.16",
    "192.0.0.192",
    "::ffff:192.0.0.192",
    "2001:0:808:808::5601:5601",  # 169.254.169.254 by Teredo, which inverts the bits
    "100.100.100.200",
    "0.0.0.0",
    "::",
    "::127.0.0.1",
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
    "fec0::1",
    "3fff::1",
    "3fff:fff::1",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "240.0.0.1",
    "255.255.255.255",
    "2001:db8::1",
    "2001:20::1",
    "2002:a00:1::1",
    "2001:0:808:808::f5ff:fffe",
    "fc00::1",
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


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2001:4860:4860::8888", "2a00::1"),
        *("192.0.1.1", "100.128.0.1", "3fff:1000::1", "172.32.0.1", "223.255.255.254"),
    ],
)
def test_public_servers_are_asked(address: str) -> None:
    """Else nothing could be fetched by default."""
    check_address(address, private=False, where="")


def test_redirects_are_held_to_the_same_rules(site: Site) -> None:
    """An innocent URL that answers with another place is the usual way around such rules."""
    places = {
        "http://169.254.169.254/latest/meta-data/": "link-local",
        "http://2852039166/latest/meta-data/": "leads to 169.254.169.254",
        "http://0xa9.0xfe.0xa9.0xfe/latest/": "leads to 169.254.169.254",
        "http://169.16689662/latest/": "leads to 169.254.169.254",
        "http://[fd00:ec2::254]/latest/": "metadata",
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
    route(monkeypatch, {"videos.example.org": ["127.0.0.1"]})
    site.files["/a.mp4"] = b"video"
    uri = site.url.replace("127.0.0.1", "videos.example.org") + "/a.mp4?token=hush"
    message = fault(videos(private=False), uri)
    assert message.startswith(f"{uri.partition('?')[0]}: leads to 127.0.0.1")
    assert "sources.private_addresses=true" in message
    assert site.asked == []
    with videos(private=True).open(uri) as video:
        assert video.size_bytes == 5


def route(monkeypatch: pytest.MonkeyPatch, places: dict[str, list[str]]) -> list[str]:
    """Makes each name lead to addresses; returns the names that are asked for, as they come."""
    original, asked = socket.getaddrinfo, []

    def resolve(host: str, *arguments: Any, **named: Any) -> Any:
        asked.append(host)
        return [found for place in places.get(host, [host]) for found in original(place, *arguments, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


#: This machine, in notations that a look at the text alone does not know.
DISGUISES = (
    *("127.0.0.1", "2130706433", "0x7f000001", "017700000001", "127.1", "0x7f.1", "127.0.0.1.", "localhost"),
    *("LOCALHOST.", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"),
    "①②⑦.⓪.⓪.①",
)


@pytest.fixture
def silent() -> Iterator[dict[str, socket.socket]]:
    """A port that listens on this machine's addresses of both families; a connection would wait there."""
    with socket.create_server(("127.0.0.1", 0)) as four:
        port = four.getsockname()[1]
        listening = {"4": four}
        with contextlib.suppress(OSError):  # a machine without IPv6
            listening["6"] = socket.create_server(("::1", port), family=socket.AF_INET6)
        for one in listening.values():
            one.setblocking(False)
        yield listening
        for one in listening.values():
            one.close()


@pytest.mark.parametrize("way", ["itself", "redirected"])
@pytest.mark.parametrize("host", DISGUISES)
def test_this_machine_is_not_even_connected_to(
    host: str, way: str, silent: dict[str, socket.socket], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether and how fast a connection is taken tells a stranger what runs on a machine."""
    uri = f"http://{host}:{silent['4'].getsockname()[1]}/a.mp4"
    if way == "redirected":  # by a server of the net, as which this machine's stands in
        route(monkeypatch, {"videos.example.org": ["8.8.8.8"], "8.8.8.8": ["127.0.0.1"]})
        site.redirects["/a.mp4"] = uri
        uri = site.url.replace("127.0.0.1", "videos.example.org") + "/a.mp4"
    message = fault(videos(private=False), uri)
    for one in silent.values():
        with pytest.raises(BlockingIOError):
            one.accept()
    assert "accepted" not in message
    assert len(site.asked) == (1 if way == "redirected" else 0)


def test_a_name_that_changes_its_mind_leads_nowhere_else(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is harmless when it is looked at and the metadata service's when it is connected to."""
    places = {"videos.example.org": ["127.0.0.1"]}
    asked = route(monkeypatch, places)
    site.before = lambda: places.update({"videos.example.org": ["169.254.169.254"]})
    site.files["/a.mp4"] = b"video"
    source = videos(private=True)
    uri = site.url.replace("127.0.0.1", "videos.example.org") + "/a.mp4"
    with source.open(uri) as video:
        assert video.size_bytes == 5
    assert asked.count("videos.example.org") == 1
    assert "leads to 169.254.169.254" in fault(videos(private=True), uri)


def test_a_name_with_several_addresses_is_reached_by_those_that_answer(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever has no IPv6, or a name with one address inside, could fetch nothing from a good server."""
    # One that is refused, one where nobody listens, and the right one.
    route(monkeypatch, {"videos.example.org": ["169.254.169.254", "127.0.0.2", "127.0.0.1"]})
    site.files["/a.mp4"] = b"video"
    with videos(private=True).open(site.url.replace("127.0.0.1", "videos.example.org") + "/a.mp4") as video:
        assert video.size_bytes == 5


def test_whoever_is_behind_a_proxy_is_told(monkeypatch: pytest.MonkeyPatch, silent: Any) -> None:
    """Elsewhere HTTPS_PROXY is enough; here it would hide where a name leads, so it is left alone."""
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent['4'].getsockname()[1]}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{silent['4'].getsockname()[1]}")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    message = fault(videos(private=True), f"http://127.0.0.1:{port}/a.mp4")
    assert "cannot be connected to; videos are fetched directly, without the proxy" in message
    with pytest.raises(BlockingIOError):
        silent["4"].accept()


def test_no_file_of_this_machine_is_read_by_a_manifest_from_elsewhere(site: Site, tmp_path: Path) -> None:
    """Frames of a private video would end in a store that others read."""
    (tmp_path / "private.mp4").write_bytes(b"private")
    path = tmp_path / "private.mp4"
    source = RemoteVideos(SourcesConfig(schemes=("https", "http"), private_addresses=True), LocalVideos())
    for uri in (str(path), path.as_uri(), f"FILE://{path}", f"file://localhost{path}", "private.mp4"):
        assert "its scheme 'file' is not allowed" in fault(source, uri)
    site.redirects["/a.mp4"] = path.as_uri()
    assert "the scheme 'file'" in fault(source, f"{site.url}/a.mp4")
    # Neither does a redirect lead to S3, where this machine's credentials would be used.
    site.redirects["/a.mp4"] = "s3://bucket/a.mp4"
    assert "the scheme 's3'" in fault(videos(private=True), f"{site.url}/a.mp4")
