"""Videos from S3 and web servers: whole or not at all, over disturbances, with nothing left behind."""

from __future__ import annotations

import fcntl
import os
import pickle
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.sources import attempts
from cluster.sources.fetch import RemoteVideos
from cluster.sources.s3 import S3Server
from gare.config import SourcesConfig
from gare.data.videos import FileVersion, LocalVideos
from gare.errors import FetchError, GoneError
from tests.helpers.servers import DroppingProxy, Site, fill_bucket

QUICK = {"backoff_s": 0.0, "timeout_s": 10.0}


def videos(**settings: Any) -> RemoteVideos:
    return RemoteVideos(SourcesConfig(**{**QUICK, "private_addresses": True, **settings}), LocalVideos())


def fault(source: RemoteVideos, uri: str) -> FetchError:
    """What opening the video ends with; nothing may come of it."""
    with pytest.raises(FetchError) as caught, source.open(uri):
        raise AssertionError("it was opened")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder for fetched videos in a folder for temporary files of this test alone."""
    shared = tmp_path / "temporary"
    folder = shared / f"gare-videos-{os.geteuid()}"
    folder.mkdir(mode=0o700, parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    return folder


@pytest.fixture
def content(rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(300_000, 600_000)))


def test_all_schemes_of_one_manifest(s3: Any, site: Site, tmp_path: Path, temporary: Path) -> None:
    """A collection grows over years and places; the same bytes must come from each of them."""
    s3.put_object(Bucket="videos", Key="sub folder/100% é?.mp4", Body=b"from s3")
    site.files["/clip.webm"] = b"from the web"
    local = tmp_path / "local #1?.mp4"
    local.write_bytes(b"from here")
    source = pickle.loads(pickle.dumps(videos()))
    expected = {
        "s3://videos/sub%20folder/100%25%20%C3%A9%3F.mp4": b"from s3",
        f"{site.url}/clip.webm?signature=secret": b"from the web",
        str(local): b"from here",
        local.as_uri(): b"from here",
    }
    for uri, body in expected.items():
        with source.open(uri) as video:
            assert Path(video.path).read_bytes() == body
            assert video.size_bytes == len(body)
            assert Path(video.path).suffix == (".webm" if "webm" in uri else ".mp4")
        assert list(temporary.iterdir()) == []
    assert local.exists()
    versions = source.stat(list(expected))
    assert [version.size_bytes for version in versions.values()] == [len(body) for body in expected.values()]


def test_version_tells_a_changed_video(s3: Any, site: Site, tmp_path: Path) -> None:
    """A video that was replaced must be seen as new without reading it, one that was not must not."""
    local = tmp_path / "a.mp4"
    uris = ["s3://videos/a.mp4", f"{site.url}/a.mp4", f"{site.url}/b.mp4", str(local)]

    def put(body: bytes, number: int) -> None:
        s3.put_object(Bucket="videos", Key="a.mp4", Body=body)
        site.files.update({"/a.mp4": body, "/b.mp4": body})
        site.headers["/a.mp4"] = {"ETag": f'"{number}"'}
        site.headers["/b.mp4"] = {"Last-Modified": f"Thu, 0{number} Jan 2026 00:00:00 GMT"}
        local.write_bytes(body)
        os.utime(local, ns=(number, number))

    source = videos()
    put(b"one", 1)
    first = source.stat(uris)
    assert source.stat(uris) == first
    assert first[str(local)] == FileVersion(3, "1")
    for uri in uris:
        with source.open(uri) as video:
            assert (video.size_bytes, video.version) == (first[uri].size_bytes, first[uri].version)
    put(b"two", 2)
    for uri, version in source.stat(uris).items():
        assert version.size_bytes == 3
        assert version.version != first[uri].version


def test_faults_of_many_are_those_of_each(s3: Any, site: Site, tmp_path: Path) -> None:
    """One video that is gone must not hide the state of ten thousand others."""
    s3.put_object(Bucket="videos", Key="a.mp4", Body=b"a")
    site.files["/empty.mp4"] = b""
    gone = [
        "s3://videos/none.mp4",
        "s3://no-such-bucket/a.mp4",
        f"{site.url}/none.mp4",
        str(tmp_path / "none"),
    ]
    found = videos().stat(["s3://videos/a.mp4", f"{site.url}/empty.mp4", *gone, "ftp://host/a", "s3:///a"])
    assert found["s3://videos/a.mp4"].size_bytes == 1
    assert found[f"{site.url}/empty.mp4"].size_bytes == 0
    assert all(isinstance(found[uri], FetchError) for uri in [*gone, "ftp://host/a", "s3:///a"])


def test_disturbed_fetches_give_the_same_bytes(
    s3: Any, s3_proxy: DroppingProxy, content: bytes, temporary: Path
) -> None:
    """A network that drops connections must neither lose a video nor cut or mix it."""
    s3.put_object(Bucket="videos", Key="a.mp4", Body=content)
    source = videos(retries=60)
    s3_proxy.disturb(drops=12)
    for _ in range(40):
        with source.open("s3://videos/a.mp4") as video:
            assert Path(video.path).read_bytes() == content
        if s3_proxy.dropped["connect"] + s3_proxy.dropped["body"] == 12:
            break
        source = videos(retries=60)  # connections of its own
    assert s3_proxy.dropped["body"] > 0
    assert list(temporary.iterdir()) == []


def test_a_broken_body_goes_on_where_it_was(site: Site, content: bytes) -> None:
    """Starting a film of gigabytes over at each lost connection would never end."""
    site.files["/a.mp4"], site.headers["/a.mp4"] = content, {"ETag": '"1"'}
    site.faults = [("cut", 100_000), 503, ("cut", 50_000)]
    with videos(retries=2).open(f"{site.url}/a.mp4") as video:
        assert Path(video.path).read_bytes() == content
    ranges = [asked for _, asked in site.asked]
    assert ranges == ["", "bytes=100000-", "bytes=100000-", "bytes=150000-"]


@pytest.mark.parametrize("how", ["no ranges", "no version", "weak version"])
def test_a_broken_body_starts_anew_where_it_must(site: Site, content: bytes, how: str) -> None:
    """The rest of another version behind the start of this one would be a video that never was."""
    site.files["/a.mp4"] = content
    site.headers["/a.mp4"] = (
        {} if how == "no version" else {"ETag": 'W/"1"' if how == "weak version" else '"1"'}
    )
    site.ranges = how != "no ranges"
    site.faults = [("cut", 100_000)]
    with videos().open(f"{site.url}/a.mp4") as video:
        assert Path(video.path).read_bytes() == content
    assert len(site.asked) == 2


def test_a_video_that_changes_meanwhile_is_one_of_the_two(s3: Any, site: Site, content: bytes) -> None:
    """Half of the old and half of the new file would decode to garbage, or worse, to pictures."""
    other = content[::-1]
    site.files["/a.mp4"], site.headers["/a.mp4"] = content, {"ETag": '"1"'}
    site.faults = [("cut", 100_000)]

    def change() -> None:
        if len(site.asked) == 2:
            site.files["/a.mp4"], site.headers["/a.mp4"] = other, {"ETag": '"2"'}

    site.before = change
    with videos().open(f"{site.url}/a.mp4") as video:
        assert Path(video.path).read_bytes() == other
        assert video.version == '"2"'


def test_an_object_that_changes_meanwhile(
    s3: Any, s3_proxy: DroppingProxy, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, where S3 refuses the rest of what is no longer there."""
    s3.put_object(Bucket="videos", Key="a.mp4", Body=content)
    source = videos()
    server = source._servers["s3"]
    get, calls = server.get, []

    def broken_once(uri: str, start: int, version: str, timeout_s: float) -> Any:
        calls.append(start)
        if len(calls) == 2:
            s3.put_object(Bucket="videos", Key="a.mp4", Body=content[::-1])
        return get(uri, start, version, timeout_s)

    monkeypatch.setattr(server, "get", broken_once)
    chunks = _break_after(2, monkeypatch)
    with source.open("s3://videos/a.mp4") as video:
        assert Path(video.path).read_bytes() == content[::-1]
    assert chunks["broken"] == 1
    assert calls == [0, 2 * 64 * 1024, 0]


def _break_after(count: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Breaks the first body of S3 after some chunks."""
    from cluster.sources import s3 as module

    original, state = module._chunks, {"broken": 0}

    def chunks(body: Any, uri: str) -> Any:
        for number, chunk in enumerate(original(body, uri)):
            if number == count and not state["broken"]:
                state["broken"] = 1
                raise attempts.TransientError("the connection was lost")
            yield chunk

    monkeypatch.setattr(module, "_chunks", chunks)
    return state


@pytest.mark.parametrize("status", [401, 403, 404, 410, 501])
def test_what_stays_refused_is_asked_once(site: Site, status: int) -> None:
    """New tries of what is forbidden or gone cost hours over a collection, and look like an attack."""
    site.faults = [status] * 3
    error = fault(videos(), f"{site.url}/a.mp4")
    assert str(status) in error.what
    assert len(site.asked) == 1
    # Another night may have another signature or right, for the same video.
    assert error.is_transient == (status in (401, 403))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_be_over_is_asked_again(site: Site, status: int) -> None:
    """Servers are busy; a video must not be lost to a second of it, nor asked for without end."""
    site.files["/a.mp4"] = b"video"
    site.faults = [status, status]
    with videos(retries=2).open(f"{site.url}/a.mp4") as video:
        assert Path(video.path).read_bytes() == b"video"
    site.asked.clear()
    site.faults = [status] * 9
    error = fault(videos(retries=2), f"{site.url}/a.mp4")
    assert f"{status}" in error.what
    assert error.what.endswith("after 3 tries")
    assert len(site.asked) == 3


def test_s3_says_why(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has to mend it: gone, forbidden and without credentials are three different errands."""
    assert "no such object" in fault(videos(), "s3://videos/none.mp4").what
    assert "NoSuchBucket" in fault(videos(), "s3://no-such-bucket/a.mp4").what
    assert "names no bucket" in fault(videos(), "s3:///a.mp4").what
    assert fault(videos(), "s3://key:secret@videos/a.mp4").where == "s3://videos/a.mp4"
    assert "Invalid bucket name" in fault(videos(), "s3://no bucket/a.mp4").what
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    error = fault(videos(), "s3://videos/none.mp4")
    assert "no credentials" in error.what
    assert "sources.anonymous=true" in error.accepted
    s3.put_object(Bucket="videos", Key="a.mp4", Body=b"public", ACL="public-read")
    with videos(anonymous=True).open("s3://videos/a.mp4") as video:
        assert video.size_bytes == 6


def test_an_endpoint_that_is_down_is_said(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong AWS_ENDPOINT_URL is the first thing that goes wrong; it must not look like lost videos."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    error = fault(videos(retries=2), "s3://videos/a.mp4")
    assert error.what == "the S3 endpoint cannot be connected to, after 3 tries"
    error = fault(videos(retries=0), "http://127.0.0.1:1/a.mp4")
    assert error.what == "the server cannot be connected to, after 1 try"


def test_a_wrong_checksum_is_never_handed_on(site: Site, content: bytes) -> None:
    """Right length, wrong bytes: memory and disks do that; an ETag that is an MD5 tells."""
    site.files["/a.mp4"] = content
    site.headers["/a.mp4"] = {"ETag": f'"{"0" * 32}"', "x-amz-request-id": "1"}
    assert "MD5 of the downloaded data does not match" in fault(videos(retries=1), f"{site.url}/a.mp4").what
    assert len(site.asked) == 2
    # Under a key of its own an object's ETag looks like an MD5 and is none.
    site.headers["/a.mp4"]["x-amz-server-side-encryption"] = "aws:kms"
    with videos().open(f"{site.url}/a.mp4") as video:
        assert Path(video.path).read_bytes() == content


def test_lengths_that_cannot_be_checked_are_refused(site: Site) -> None:
    """A body that just ends may have been cut; nobody could tell."""
    site.files["/a.mp4"] = b"video"
    site.headers["/a.mp4"] = {"Transfer-Encoding": "identity", "Connection": "close"}
    assert "the server does not state its size" in fault(videos(), f"{site.url}/a.mp4").what


def test_large_videos_are_refused_before_they_come(
    s3: Any, site: Site, content: bytes, temporary: Path
) -> None:
    """One film of a hundred gigabytes among clips must not fill the disk of a worker."""
    s3.put_object(Bucket="videos", Key="a.mp4", Body=content)
    site.files["/a.mp4"] = content
    for uri in ("s3://videos/a.mp4", f"{site.url}/a.mp4"):
        error = fault(videos(max_video_mb=0.1), uri)
        assert error.what == "is larger than 0.1 MB"
        assert "sources.max_video_mb" in error.accepted
    assert list(temporary.iterdir()) == []


def test_a_full_disk_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    """Other workers' videos go as well as they came; a disk that stays full is named, not the video."""
    site.files["/a.mp4"] = b"video"
    usage = shutil.disk_usage(temporary)
    full, times = usage._replace(free=10**6), [2]

    def disk_usage(path: Path) -> Any:
        times[0] -= 1
        return full if times[0] >= 0 else usage

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with videos().open(f"{site.url}/a.mp4") as video:
        assert video.size_bytes == 5
    times[0] = 99
    assert "no room on the disk" in fault(videos(retries=2), f"{site.url}/a.mp4").what


@pytest.mark.parametrize("versions", [{"ETag": '"1"'}, {}], ids=["version", "no version"])
def test_a_disk_that_fails_in_the_middle_mixes_nothing(
    site: Site, content: bytes, versions: dict[str, str]
) -> None:
    """What a full disk refused is still in a buffer, and must not come before what is fetched again."""
    site.files["/a.mp4"], site.headers["/a.mp4"] = content, versions
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room() -> None:
        if len(site.asked) > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    site.before = make_room
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with videos().open(f"{site.url}/a.mp4") as video:
            assert Path(video.path).read_bytes() == content
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(site.asked) == 2


def test_fetching_has_a_deadline(site: Site) -> None:
    """A server that asks to wait an hour, for each of ten thousand videos, must not hold the night's run."""
    site.faults = [503] * 1000
    site.headers["/a.mp4"] = {}
    error = fault(videos(deadline_s=0.3, retries=100, backoff_s=0.2), f"{site.url}/a.mp4")
    assert "within its deadline of 0.3 s" in error.what
    assert "503" in error.what


def test_a_dripping_server_is_left(site: Site) -> None:
    """A byte now and then keeps a connection alive for days; the deadline counts all the same."""
    site.files["/a.mp4"] = b"x" * 10**6
    site.drip_s = 0.02
    error = fault(videos(deadline_s=0.3), f"{site.url}/a.mp4")
    assert "within its deadline of 0.3 s" in error.what
    assert len(site.asked) == 1


def test_what_a_killed_worker_left_is_removed(site: Site, temporary: Path) -> None:
    """Nights with kills would otherwise fill the disk with videos that nobody will decode."""
    abandoned = temporary / "gare-video-abandoned.mp4"
    abandoned.write_bytes(b"half a video")
    held = temporary / "gare-video-held.mp4"
    held.write_bytes(b"of another worker")
    foreign = temporary / "other.mp4"
    foreign.write_bytes(b"not ours")
    site.files["/a.mp4"] = b"video"
    with held.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with videos().open(f"{site.url}/a.mp4") as video, videos().open(f"{site.url}/a.mp4") as second:
            assert {path.name for path in temporary.iterdir()} == {
                *(held.name, foreign.name),
                *(Path(video.path).name, Path(second.path).name),
            }
    assert {path.name for path in temporary.iterdir()} == {held.name, foreign.name}


def test_a_fault_while_it_is_decoded_leaves_nothing(site: Site, temporary: Path) -> None:
    """Broken videos are the rule in large collections; each would leave its file behind."""
    site.files["/a.mp4"] = b"video"
    with pytest.raises(RuntimeError), videos().open(f"{site.url}/a.mp4"):
        raise RuntimeError
    assert list(temporary.iterdir()) == []


def test_schemes_are_those_of_the_configuration(site: Site, tmp_path: Path) -> None:
    """A manifest from elsewhere must not make a worker read its own files or ask around in its network."""
    (tmp_path / "secret").write_text("private")
    for uri in (str(tmp_path / "secret"), (tmp_path / "secret").as_uri(), "FILE:///etc/passwd", "~/x"):
        assert "'file' is not allowed" in fault(videos(schemes=["s3", "https"]), uri).what
    assert "'http' is not allowed" in fault(videos(schemes=["file", "s3"]), f"{site.url}/a").what
    assert "'gs' is not allowed" in fault(videos(), "gs://bucket/a.mp4").what
    assert site.asked == []


def test_folders_are_listed(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All videos of a folder count, of that folder alone, by names that captions use."""
    names = ["a.mp4", "sub/100% é.mp4", "sub/deep/b.mp4"]
    for name in [*(f"my clips/{name}" for name in names), "my clips/", "my clips 2/c.mp4"]:
        s3.put_object(Bucket="videos", Key=name, Body=b"")
    for folder in ("s3://videos/my%20clips", "s3://videos/my clips/"):
        assert videos().list(folder) == names
    assert len(videos().list("s3://videos")) == 4
    assert videos().list("s3://videos/none") == []
    with pytest.raises(FetchError, match="NoSuchBucket"):
        videos().list("s3://no-such-bucket/a")
    with pytest.raises(FetchError, match="cannot be listed"):
        videos().list("https://host/videos")


def test_no_secret_is_shown(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Signatures in failures, logs and MLflow would let every reader fetch what only the owner may."""
    caplog.set_level("DEBUG")
    site.faults = [503, 403]
    error = fault(videos(), f"{site.url}/a.mp4?X-Amz-Signature=hush&token=hush")
    assert error.where == f"{site.url}/a.mp4"
    site.redirects["/b.mp4"] = f"{site.url}/c.mp4?token=hush"
    assert "404" in fault(videos(), f"{site.url}/b.mp4").what
    fault(videos(retries=0), "http://127.0.0.1:1/a.mp4?token=hush")
    fault(videos(), f"http://me:hush@{site.url.removeprefix('http://')}/a.mp4")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("cluster", "gare"))]
    assert "hush" not in "".join([str(error), *ours])


@pytest.mark.parametrize("count", [3, 60])
def test_versions_of_many_objects_are_listed(count: int, s3: Any, s3_proxy: DroppingProxy) -> None:
    """One request a video, three times a run, takes a day for ten million."""
    names = [f"é {number:04d}.mp4" for number in range(count)]
    others = [f"{name}.txt" for name in names] + ["sub/0001.mp4", "sub/é 0001.mp4"]
    fill_bucket("videos", {f"in/{name}": b"x" * len(name) for name in names + others})
    uris = [f"s3://videos/in/{name.replace('é ', '%C3%A9%20')}" for name in reversed(names)]
    s3_proxy.requests.clear()
    found = videos().stat([*uris, "s3://videos/in/none.mp4", "s3://videos/in/none.mp4"])
    # One that is not listed is asked for, so that its fault is named.
    assert len(s3_proxy.requests) == (count + 1 if count < 16 else 2)
    assert list(found) == [*uris, "s3://videos/in/none.mp4"]
    assert isinstance(found.pop("s3://videos/in/none.mp4"), GoneError)
    single = videos()
    for uri, version in found.items():
        name = uri.rsplit("/", 1)[-1]
        assert single.stat([uri])[uri] == version
        assert version.size_bytes == len(name.replace("%C3%A9%20", "é "))


def test_a_folder_of_other_objects_is_not_listed_to_its_end(
    s3: Any, s3_proxy: DroppingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred videos of a bucket of millions need no list of them all."""
    names = [f"{number:05d}.mp4" for number in range(1200)]
    fill_bucket("videos", dict.fromkeys(names, b"x"))
    wanted = [f"s3://videos/{name}" for name in names[::40]]
    page = S3Server._page
    monkeypatch.setattr(S3Server, "_page", lambda *asked: _shortened(page(*asked), 10))
    s3_proxy.requests.clear()
    found = videos().stat(wanted)
    assert {version.size_bytes for version in found.values()} == {1}
    # No page brought more than one of them, so that each page took one request and saved one.
    assert len(s3_proxy.requests) <= len(wanted) + 5


def test_a_list_goes_on_behind_what_it_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same page came again until the last try, for a short name with many like it before."""
    names = [*(f"in/v1{number:03d}" for number in range(100)), *(f"in/v{number}" for number in range(2, 10))]

    def page(server: S3Server, bucket: str, prefix: str, start: str, timeout_s: float) -> dict[str, Any]:
        entries = [{"Key": name, "Size": 1, "ETag": '"a"'} for name in names if name > start]
        return _shortened({"Contents": entries}, 10)

    monkeypatch.setattr(S3Server, "_page", page)
    found = S3Server(SourcesConfig(), 1).listed("videos", names, lambda request: request(1.0))
    assert list(found) == names


def _shortened(page: dict[str, Any], length: int) -> dict[str, Any]:
    """Returns a page as a server gives it that lists fewer objects at once."""
    return {"Contents": page["Contents"][:length], "IsTruncated": True}


def test_who_may_not_list_asks_for_each(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some keys may read objects and not list the bucket."""
    fill_bucket("videos", {f"{number}.mp4": b"x" for number in range(20)})

    def refused(*unused: Any) -> Any:
        raise FetchError("access is denied", where="s3://videos")

    monkeypatch.setattr(S3Server, "_page", refused)
    found = videos().stat([f"s3://videos/{number}.mp4" for number in range(20)])
    assert {version.size_bytes for version in found.values()} == {1}
