"""gare/storage/object_store.py and files.py over it: outputs on S3, with a network that drops connections."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gare.config import ExtractConfig
from gare.data.store.contents import Store
from gare.data.store.frame_reader import FrameReader
from gare.errors import DataError
from gare.storage import files, object_store
from gare.storage.files import (
    copy_files,
    delete_tree,
    exists,
    join,
    list_files,
    open_fs,
    read_bytes,
    read_json,
    write_atomically,
    write_json,
)
from tests.helpers.servers import DroppingProxy
from tests.helpers.stores import write_store

EXTRACT = ExtractConfig(num_frames=2, image_size=32, encoding="raw")


def test_outputs_on_s3_are_as_local_ones(s3: Any, s3_proxy: DroppingProxy) -> None:
    """All that steps read and write goes through these; one that is otherwise on S3 loses data there."""
    folder = "s3://videos/out puts"
    for name in ("a b.txt", "100%.txt", "what?.txt", "naïve 日本語 #.txt"):
        write_atomically(join(folder, "sub", name), b"content")
        assert exists(join(folder, "sub", name))
        assert read_bytes(join(folder, "sub", name)) == b"content"
    assert len(list_files(join(folder, "sub"))) == 4
    assert list_files(folder, recursive=True) == list_files(join(folder, "sub"))
    copy_files(join(folder, "sub"), join(folder, "copy"))
    listed = s3.list_objects_v2(Bucket="videos", Prefix="out puts/copy/")["Contents"]
    names = ["100%.txt", "a b.txt", "naïve 日本語 #.txt", "what?.txt"]
    assert [entry["Key"] for entry in listed] == [f"out puts/copy/{name}" for name in names]
    write_json(join(folder, "x.json"), {"a": 1})
    assert read_json(join(folder, "x.json")) == {"a": 1}
    delete_tree(folder)
    assert not exists(join(folder, "x.json"))
    assert list_files(folder, recursive=True) == []
    with pytest.raises(DataError, match="cannot be read"):
        read_bytes(join(folder, "none"))
    with pytest.raises(DataError, match="cannot be written"):
        write_atomically("s3://no-such-bucket/a", b"")


def test_a_record_that_grows_while_it_is_read_comes_whole(
    s3: Any, s3_proxy: DroppingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A description that another job replaces by a longer one would come cut off, and end who reads it."""
    uri = "s3://videos/record.json"
    write_json(uri, {"a": 1})
    filesystem, _ = open_fs(uri)
    longer = iter([{"a": [1] * 100}, {"a": [1] * 200}])

    class Replacing:
        """The file system, where the object is replaced between the look at its size and the reading."""

        def open_input_file(self, path: str) -> Any:
            stream = filesystem.open_input_file(path)
            if (content := next(longer, None)) is not None:
                s3.put_object(Bucket="videos", Key="record.json", Body=json.dumps(content).encode())
            return stream

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_fs", lambda _: (Replacing(), "videos/record.json"))
        assert read_json(uri) == {"a": [1] * 200}
    s3.put_object(Bucket="videos", Key="record.json", Body=b'{"a": 1')
    with pytest.raises(DataError, match="is not JSON"):
        read_json(uri)


def test_the_endpoint_is_that_of_the_environment(
    s3_proxy: DroppingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who keeps data on premises would otherwise ask Amazon for them, with their credentials."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://minio.example.org:9000/")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    own: Any = open_fs("s3://bucket/key")[0]
    assert own.region == "eu-west-1"
    assert "minio.example.org:9000" in str(own.__reduce__())
    named: Any = open_fs("s3://bucket/key?region=us-west-2&scheme=http&endpoint_override=host:9")[0]
    assert named.region == "us-west-2"
    assert "host:9" in str(named.__reduce__())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "ftp://host")
    with pytest.raises(DataError, match="scheme is 'ftp'"):
        open_fs("s3://bucket/key")


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/a", "s3:///a", "s3://bucket/a?secret=secret"])
def test_credentials_in_locations_are_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A location is written into stores, logs and messages; a key in it would be, too."""
    with pytest.raises(DataError) as caught:
        open_fs(uri)
    assert "secret" not in str(caught.value).replace("has a query", "")
    assert "s3://bucket/key" in caught.value.accepted


def test_a_store_written_and_read_over_lost_connections(
    s3: Any, s3_proxy: DroppingProxy, rng: np.random.Generator
) -> None:
    """A part that is half there, or twice, or wrong, would train a model on what nobody decoded."""
    ids = [f"clip {number}" for number in range(6)]
    s3_proxy.disturb(drops=8, most_bytes=20_000)
    frames = write_store("s3://videos/store", EXTRACT, ids, rng, part=2)
    assert sum(s3_proxy.dropped.values()) > 0
    s3_proxy.disturb(drops=8, most_bytes=20_000)
    read, mask = FrameReader("s3://videos/store").read(ids)
    assert Store("s3://videos/store").ids().keys() == set(ids)
    for row, name in enumerate(ids):
        assert mask[row].sum() == len(frames[name])
        np.testing.assert_array_equal(read[row][mask[row]], frames[name])


def test_a_part_that_cannot_be_written_is_not_there(
    s3: Any, s3_proxy: DroppingProxy, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """With a network that is gone for good the step ends with a reason, and the older file is as it was."""
    location, large = "s3://videos/part.parquet", rng.bytes(7_000_000)
    write_atomically(location, b"old")
    # What breaks off may be any request of an upload, or the answer to it.
    most_bytes = int(rng.choice([500, 2_000, 50_000, 6_000_000]))
    monkeypatch.setattr(object_store, "MAX_RETRIES", 1)
    object_store._file_system.cache_clear()
    s3_proxy.disturb(drops=1000, most_bytes=most_bytes, share=1.0)
    for _ in range(2):
        with pytest.raises(DataError, match="cannot be written") as caught:
            write_atomically(location, large)
        assert "\n" not in str(caught.value)
    object_store._file_system.cache_clear()
    s3_proxy.disturb(0)
    assert s3.get_object(Bucket="videos", Key="part.parquet")["Body"].read() == b"old"
    write_atomically(location, large)
    assert read_bytes(location) == large


def test_an_outage_leaves_tries_for_later(
    s3: Any, s3_proxy: DroppingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that waited for its storage would else be ended by the first connection lost after that."""
    monkeypatch.setattr(object_store, "MAX_RETRIES", 2)
    object_store._file_system.cache_clear()
    try:
        write_atomically("s3://videos/there", b"content")
        s3_proxy.disturb(drops=10**6, most_bytes=2, share=1.0)
        # The SDK's standard client has a budget of 100 tries again.
        for _ in range(60):
            with pytest.raises(DataError):
                read_bytes("s3://videos/there")
        for _ in range(3):
            s3_proxy.disturb(drops=1, most_bytes=2, share=1.0)
            assert read_bytes("s3://videos/there") == b"content"
            assert sum(s3_proxy.dropped.values()) == 1
    finally:
        s3_proxy.disturb(0)
        object_store._file_system.cache_clear()
