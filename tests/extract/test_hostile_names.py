"""Ids and file names from data never become paths: a store holds the files that it always holds."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.layout import layout
from cluster.sources.temporary import temporary_video
from cluster.tracking.extraction import ExtractionRun
from gare.config import ExtractConfig, parse_config
from gare.data.manifest import Manifest, ManifestRow, read_manifest, write_manifest
from gare.data.store.compact import compact
from gare.data.store.contents import FAILURE_SCHEMA, Store, frame_schema, write_part
from gare.data.store.frame_reader import FrameReader
from gare.errors import ConfigError
from gare.extract.frame_writer import Extractor
from gare.report.contact_sheet import draw_preview
from gare.retrieval.gallery import gallery_of, write_gallery
from gare.storage.files import read_bytes
from pipelines.stored_outbox import pending_of
from tests.helpers.stores import describe_store, failure_row, pending_rows, random_frames, stored_row

EXTRACT = ExtractConfig(num_frames=2, image_size=16, encoding="raw")
#: Ids that somebody has thought about.
HOSTILE = (
    *("../../outside", "..", ".", "/etc/passwd", "//host/share", "~", "~root/.ssh/id", "a/../../../b"),
    *("..\\..\\outside", "C:\\Windows\\win.ini", "CON", "nul.txt", "COM1.parquet", "a:stream", "\\\\host\\x"),
    *(
        "a\0b",
        "a\nb",
        "\r\n",
        "\x1b[2J",
        " ",
        "\t",
        "-rf",
        "--config=x",
        "$(touch x)",
        "`touch x`",
        "%2e%2e%2f",
    ),
    *("x" * 5000, "é" * 300, "日本語 🎬", "a\u202egpm.exe", "e\u0301", "\ufeff", "part-0.parquet"),
    *("file:///etc/passwd", "s3://bucket/key", "http://169.254.169.254/", "{video_id}", "%s%n", "_META.json"),
)
#: File names like any other where this runs.
DEVICES = ("CON", "nul.txt", "COM1.parquet", "part-0.parquet")
PIECES = ("..", ".", "/", "\\", "~", "\0", "a", "%", ":", "\n")
ids = st.one_of(
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from(["..", ".", "/", "\\", "~", "\0", "a", "%", ":", "\n"]), min_size=1).map(
        "".join
    ),
    # Half a surrogate is refused by the manifest, which its own tests show.
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
)
#: All files that there may be below the folder of a data set.
FILES = re.compile(
    r"manifest\.parquet|gallery\.safetensors|preview\.png"
    r"|frames/(data|failures)/part-[0-9a-f]{20}\.parquet|frames/_(META|RETIRED)\.json"
)


@contextmanager
def guarded(folder: Path) -> Iterator[Path]:
    """A folder for outputs; afterwards it holds what it may, and nothing beside it has come or changed."""
    outputs, beside = folder / "a" / "b" / "own", folder / "a" / "beside"
    outputs.mkdir(parents=True)
    beside.write_text("kept")
    yield outputs
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    strange = {name for name in files - {"a/beside"} if not FILES.fullmatch(name.removeprefix("a/b/own/"))}
    assert strange == set()
    assert beside.read_text() == "kept"


def manifest_of(names: Sequence[str], uri: str = "/videos/{}.mp4") -> Manifest:
    rows = (ManifestRow(name, uri.format(name), None, None, "test", (f"of {name}",)) for name in names)
    return Manifest(tuple(rows), "folder", "own")


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(names=st.lists(ids, min_size=3, max_size=8, unique=True))
def test_no_id_leaves_the_store(names: list[str]) -> None:
    """A manifest from somebody else would write where it likes, with the rights of whoever extracts."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, guarded(Path(folder)) as outputs:
        write_manifest(manifest_of(names), str(outputs / "manifest.parquet"))
        rows = read_manifest(str(outputs / "manifest.parquet")).rows
        assert [row.video_id for row in rows] == names

        store = str(outputs / "frames")
        good, bad = names[:-1], names[-1]
        frames = {name: random_frames(EXTRACT, rng, 2) for name in good}
        stored = [stored_row(EXTRACT, name, frames[name]) for name in good]
        write_part(store, "data", stored[:1], frame_schema(EXTRACT))
        write_part(store, "data", stored[1:], frame_schema(EXTRACT))
        write_part(store, "failures", [failure_row(bad)], FAILURE_SCHEMA)
        describe_store(store, EXTRACT)
        Store(store).write_retired({"checksum": {bad: "gone"}})
        assert set(Store(store).read_failures(good)) == {bad}
        reader = FrameReader(store)
        assert set(reader.places) == set(good)
        assert np.array_equal(reader.read(good)[0], np.stack([frames[name] for name in good]))
        compact(store, 10**6)
        assert np.array_equal(FrameReader(store).read(good)[0], np.stack([frames[name] for name in good]))

        picture = outputs / "preview.png"
        picture.write_bytes(draw_preview(store, rows, 3))
        with Image.open(picture) as image:
            image.verify()
        gallery = str(outputs / "gallery.safetensors")
        write_gallery(gallery, good, np.zeros((len(good), 2, 4), np.float32), np.ones((len(good), 2), bool))
        assert gallery_of(read_bytes(gallery), gallery).video_ids == tuple(good)


def test_real_videos_with_such_ids_go_the_whole_way(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decoding, its failures and MLflow make of an id is what a stranger's manifest really meets."""
    monkeypatch.chdir(tmp_path)
    clip = str(shared / "data" / "videos" / "realshort.mp4")
    names = list(HOSTILE)
    rows = [
        ManifestRow(name, clip if number % 4 else f"/nowhere/{number}", None, None, "test", (name,))
        for number, name in enumerate(names)
        if name.strip()
    ]
    config = parse_config({"name": "own", "storage": {"root": str(tmp_path / "root")}})
    places = layout(config)
    manifest = Manifest(tuple(rows), "folder", "own")
    write_manifest(manifest, places.manifest)
    worker = Extractor(places.frames, EXTRACT)
    try:
        pending = pending_rows(manifest, places.frames, retry_failed=False)
        done = worker.write(pending[:20]), worker.write(pending[20:])
    finally:
        worker.close()
    failures = Store(places.frames).read_failures(())
    assert sum(one["failed"] for one in done) == len(failures) == len(rows[::4])
    with ExtractionRun(config, "extract", places.root, pending_of(places)) as tracked:
        tracked.log({"new": len(rows)}, {}, failures)
        tracked.log_result({"fingerprint": "0", "store": places.frames, "failed": list(failures)})
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    expected = (
        r"root/(mlflow\.db(\.lock|-wal|-shm)?|own/manifest\.parquet"
        r"|own/frames/(data|failures)/part-[0-9a-f]{20}\.parquet"
        r"|mlartifacts/[0-9a-f]{32}/artifacts/(failures|result)\.json)"
    )
    assert {name for name in files if not re.fullmatch(expected, name)} == set()
    assert len([name for name in files if "mlartifacts" in name]) == 2


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in DEVICES])
@pytest.mark.parametrize("key", ["name", "train.run", "evaluate.suite"])
def test_no_name_of_the_configuration_is_a_path(key: str, name: str) -> None:
    """Names become folders: one with a separator would write, or with overwrite delete, somewhere else."""
    section, _, field = key.rpartition(".")
    tree = {section: {field: name}} if section else {field: name}
    with pytest.raises(ConfigError):
        parse_config(tree)


@pytest.mark.parametrize(
    "name", [*HOSTILE, "https://host/x.m/../p4", "s3://b/../x.mp4/..", "s3://b/x.mp4\0.sh"]
)
def test_no_uri_names_the_temporary_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetched video lies on this machine while it is decoded, under a name that is ours."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_video(name) as stream:
        found = Path(stream.name)
        assert found.parent == tmp_path / f"gare-videos-{os.geteuid()}"
        assert re.fullmatch(r"gare-video-\w+(\.[A-Za-z0-9]{1,5})?", found.name)
    assert list(tmp_path.rglob("*")) == [found.parent]
