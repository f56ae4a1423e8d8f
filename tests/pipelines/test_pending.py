"""What waits for MLflow on an object store, to which nothing can be appended."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.storage import Layout
from pipelines import pending as pending_module
from pipelines.pending import StoredOutbox, pending_of


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


def test_locally_it_is_a_file(places: Layout) -> None:
    """A folder that all nodes mount can be appended to."""
    assert pending_of(places) == f"{places.data}/mlflow-pending.jsonl"
