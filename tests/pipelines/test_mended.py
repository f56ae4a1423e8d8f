"""Stores whose clips an earlier version read wrongly: checked, and made again where it is asked for."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.layout import Layout, layout
from gare.data.manifest import read_manifest, write_manifest
from gare.data.store.contents import Store, part_files, read_columns
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.data.store.parts import write_table
from gare.storage.files import delete_file
from gare.storage.generations import generation_of
from pipelines import extract
from tests.helpers.pipelines import in_process, snapshot, tiny

#: Clips of which earlier versions took other frames.
WRONG = {"concat", "gap264"}


@pytest.fixture
def mixed(
    trained: dict[str, Any], places: Layout, shared: Path, request: pytest.FixtureRequest
) -> tuple[Layout, tuple[str, ...]]:
    """A collection of three good clips and two that were read wrongly, and the settings of its stores."""
    kind = request.param
    own = layout(tiny(f"name=mended-{kind}"))
    source = read_manifest(places.manifest)
    bad = [shared / "data/faults" / name for name in ("01/concat.ts", "02/gap264.avi")]
    rows = [replace(source.rows[0], video_id=path.stem, uri=str(path)) for path in bad]
    write_manifest(replace(source, rows=(*source.rows[:3], *rows)), own.manifest)
    weights = f"features.weights={trained['checkpoint']}"
    return own, (f"name=mended-{kind}", f"extract.store={kind}", weights)


def write_as_before(store: str, values: str) -> None:
    """Writes the parts of a store as an earlier version would have: without rules, some with other values."""
    for location in part_files(store, "data"):
        table = read_columns(location, None).replace_schema_metadata(None).drop_columns(["rules"])
        ids = [str(video_id) for video_id in table["video_id"].to_pylist()]
        place = table.schema.get_field_index(values)
        column: Any = table[values].combine_chunks()
        arrays = column.to_numpy_ndarray().copy()
        arrays[[video_id in WRONG for video_id in ids]] = 1
        tensors: Any = pa.FixedShapeTensorArray.from_numpy_ndarray(arrays)
        table = table.set_column(place, table.schema.field(values), tensors.cast(column.type))
        delete_file(location)
        write_table(store, "data", table, ["before", *ids], generation=generation_of(location))


def rules(store: str) -> dict[str, int | None]:
    return {key: row["rules"] for key, (_, _, row) in Store(store).rows((), ["rules"]).items()}


@pytest.mark.parametrize("mixed", ["both", "features"], indirect=True)
def test_clips_that_were_read_wrongly_are_made_again(
    mixed: tuple[Layout, tuple[str, ...]],
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else wrong frames, and features of them, would stay "unchanged" in a store for ever."""
    own, settings = mixed
    first = extract.run(tiny(*settings))
    keeps_frames = settings[1] == "extract.store=both"
    assert (first["videos"], first["failed"]) == (5, {})
    ids = [row.video_id for row in read_manifest(own.manifest).rows]
    features = FeatureReader(own.features).read(ids)
    frames = FrameReader(own.frames).read(ids) if keeps_frames else None
    write_as_before(own.features, "frames")
    if keeps_frames:
        write_as_before(own.frames, "frames")

    command = ("--config", tiny_yaml, *settings)
    answer = in_process(capsys, extract.run, "--verify", *command, flags=extract.FLAGS)
    assert answer.status == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert (found["sound"], found["mended"].keys()) == (True, WRONG)
    assert "starts anew" in found["mended"]["concat"]
    assert "--retry-traits (extract.retry_traits=true) makes them again" in answer.stderr
    before = snapshot(own.data)
    with caplog.at_level(logging.INFO):
        assert extract.run(tiny(*settings))["unchanged"] == 5
    assert snapshot(own.data) == before

    answer = in_process(capsys, extract.run, "--retry-traits", *command, flags=extract.FLAGS)
    assert answer.status == 0, answer.stderr
    found = json.loads(answer.stdout)
    for one in (found, found.get("features", found)):
        assert [one[name] for name in ("changed", "unchanged", "videos")] == [2, 3, 5]
    for store in (own.features, *([own.frames] if keeps_frames else [])):
        assert rules(store) == {key: 2 if key in WRONG else None for key in ids}
    again = FeatureReader(own.features).read(ids)
    for name, values in features.items():
        # Of a clip that was encoded beside others the last digit of float16 may differ.
        assert np.allclose(again[name], values, atol=2e-3), name
    if frames:
        assert all(map(np.array_equal, FrameReader(own.frames).read(ids), frames))

    before = snapshot(own.data)
    assert extract.run(tiny(*settings, "extract.retry_traits=true"))["unchanged"] == 5
    assert snapshot(own.data) == before
    checked = extract.run(tiny(*settings, "upkeep.task=verify"))
    assert (checked["sound"], checked["mended"]) == (True, {})
