"""What waits for MLflow on an object store, to which nothing can be appended."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.layout import Layout
from gare.errors import DataError
from gare.storage.files import list_files, read_bytes
from pipelines import stored_outbox as pending_module
from pipelines.stored_outbox import StoredOutbox, pending_of


def entry(step: int) -> dict[str, Any]:
    return {
        "run_id": "r" * 32,
        "once": True,
        "metrics": [{"key": "loss", "value": 1.0 / step, "timestamp": step, "step": step}],
    }


def test_what_waits_on_an_object_store_is_kept_and_delivered(s3: Any) -> None:
    """A run on S3 whose tracking server is lost must not lose its curves either."""
    outbox = pending_of(Layout("s3://videos/root", "s3://videos/root/tiny"))
    assert isinstance(outbox, StoredOutbox)
    assert str(outbox) == "s3://videos/root/tiny/mlflow-pending"
    assert outbox.deliver(lambda _: pytest.fail("there is nothing yet")) == 0
    for step in range(1, 4):
        outbox.add(entry(step))

    def lost(_: dict[str, Any]) -> None:
        raise ConnectionError("still lost")

    with pytest.raises(ConnectionError):
        outbox.deliver(lost)
    # Another process: evaluate --sync on another machine.
    pending_module._empty.clear()
    sent: list[dict[str, Any]] = []
    assert StoredOutbox(outbox.uri).deliver(sent.append) == 3
    assert [row["step"] for one in sent for row in one["metrics"]] == [1, 2, 3]
    assert all(one["once"] for one in sent)
    pending_module._empty.clear()
    assert outbox.deliver(sent.append) == 0
    # The folder itself may stay, as an empty object.
    left = s3.list_objects_v2(Bucket="videos", Prefix="root/tiny/mlflow-pending/").get("Contents", ())
    assert not [entry["Key"] for entry in left if entry["Size"]]


def test_what_is_no_entry_does_not_stop_the_others(s3: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One empty object would keep MLflow from everything that waits there, for ever."""
    outbox = StoredOutbox("s3://videos/root/tiny/mlflow-pending")
    outbox.add(entry(1))
    damaged = [b"", b"{", b"[]", b'"run_id"', b"\xff", b"{}", b'{"run_id": "a", "metrics": 1}']
    for number, data in enumerate(damaged):
        s3.put_object(Bucket="videos", Key=f"root/tiny/mlflow-pending/{number}.json", Body=data)
    outbox.add(entry(2))
    sent: list[dict[str, Any]] = []

    def lost(_: dict[str, Any]) -> None:
        raise ConnectionError("lost")

    for _ in range(2):
        with pytest.raises(ConnectionError):
            outbox.deliver(lost)
    assert outbox.deliver(sent.append) == 2
    assert [row["step"] for one in sent for row in one["metrics"]] == [1, 2]
    assert caplog.text.count("skipping an incomplete entry") == len(damaged)
    aside = [read_bytes(file) for file in list_files("s3://videos/root/tiny/mlflow-pending.damaged")]
    assert aside == damaged
    assert not list_files(outbox.uri, ".json")


def test_a_storage_that_fails_keeps_the_entries(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage must not pass for damage: what waits would be put aside and never be delivered."""
    outbox = StoredOutbox("s3://videos/root/tiny/mlflow-pending")
    outbox.add(entry(1))

    def fails(uri: str) -> bytes:
        raise DataError("cannot be read", where=uri)

    with monkeypatch.context() as patch:
        patch.setattr(pending_module, "read_bytes", fails)
        with pytest.raises(DataError):
            outbox.deliver(lambda _: None)
    assert outbox.deliver(lambda _: None) == 1


def test_locally_it_is_a_file(places: Layout) -> None:
    """A folder that all nodes mount can be appended to."""
    assert pending_of(places) == f"{places.data}/mlflow-pending.jsonl"
