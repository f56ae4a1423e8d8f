"""pipelines/prepare.py on published benchmarks: --verify, missing videos, the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.command import Flag
from gare.config import parse_config
from gare.data.manifest import Manifest, read_manifest
from pipelines import prepare
from tests.helpers.annotation_copies import text_of
from tests.helpers.pipelines import command, in_process

FLAGS = {"--verify": Flag("data.verify", "compare", "true")}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration of a name of its own; outputs go below the test's folder."""
    monkeypatch.setenv("GARE_ROOT", str(tmp_path / "root"))
    path = tmp_path / "lsmdc.yaml"
    path.write_text("name: lsmdc\ndata:\n  benchmark: lsmdc\n")
    return str(path)


@pytest.fixture
def videos(shared: Path, tmp_path: Path) -> Path:
    """Files for all clips of LSMDC but the first."""
    folder = tmp_path / "videos"
    folder.mkdir()
    rows = text_of(
        shared / "data" / "annotations" / "lsmdc", "LSMDC16_challenge_1000_publictect.csv"
    ).splitlines()
    for row in rows[1:]:
        (folder / f"{row.split()[0]}.avi").write_bytes(b"video")
    return folder


def test_verify_as_a_command(repository: Path, shared: Path, tmp_path: Path, settings: str) -> None:
    """What a person types before a long run: counts, deviations and files, and nothing is written over."""
    annotations = f"data.annotations={shared}/data/annotations/msvd"
    answer = command(
        repository,
        "prepare",
        ["--config", "conf/msvd.yaml", annotations, "--verify"],
        GARE_ROOT=str(tmp_path),
    )
    assert answer.status == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["verified"] is True
    assert result["as_published"] is True
    assert result["protocol"] == "1,200/100/670 videos, all captions"
    assert result["counts"]["test"] == result["published"]["test"] == {"videos": 670, "captions": 27_763}
    assert result["missing"] is None
    assert len(result["annotation_sha256"]["captions_msvd.json.gz"]) == 64
    assert not (tmp_path / "msvd" / "manifest.parquet").exists()
    assert "27,763    27,763" in answer.stderr
    assert "videos: not looked for" in answer.stderr


def test_missing_videos(
    settings: str, videos: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a word about it, 999 clips would be scored as 1,000; asked for, the protocol says 999."""
    lost = "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886"
    keys = [f"data.annotations={shared}/data/annotations/lsmdc", f"data.videos={videos}"]
    in_process(capsys, prepare.run, "--config", settings, *keys, flags=FLAGS).refused(
        3, "test clips without video file (1)", lost, "data.allow_missing=true"
    )
    answer = in_process(capsys, prepare.run, "--config", settings, *keys, "--verify", flags=FLAGS)
    assert answer.status == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["missing"]["test"] == {"count": 1, "ids": [lost]}
    manifest = tmp_path / "root" / "lsmdc" / "manifest.parquet"
    assert not manifest.exists()
    answer = in_process(
        capsys, prepare.run, "--config", settings, *keys, "data.allow_missing=true", flags=FLAGS
    )
    assert answer.status == 0, answer.stderr
    written = read_manifest(str(manifest))
    assert len(written.of_split("test")) == 999
    assert "not as published: no train; no val; test 999 videos for 1000" in written.protocol
    assert any(lost in line for line in written.deviations)
    assert json.loads(answer.stdout)["protocol"] == written.protocol


def test_paths_that_are_not_given(settings: str, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A first run learns which key it lacks."""
    run = lambda *keys: in_process(capsys, prepare.run, "--config", settings, *keys, flags=FLAGS)  # noqa: E731
    run("data.videos=/tmp").refused(2, "data.annotations", "lsmdc's annotation files")
    run(f"data.annotations={shared}/data/annotations/lsmdc").refused(2, "data.videos", "--verify")
    run("data.annotations=/nowhere", "--verify").refused(3, "/nowhere", "is missing")


def test_noise_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of robustness compares models on the same exchanged captions, in a manifest that says so."""
    monkeypatch.setenv("GARE_ROOT", str(tmp_path / "root"))
    (tmp_path / "videos").mkdir()
    lines = ["video,caption,split"]
    for number, split in enumerate(["train"] * 20 + ["val"] * 3 + ["test"] * 3):
        (tmp_path / "videos" / f"v{number}.mp4").write_bytes(b"video")
        lines += [f"v{number}.mp4,{word} {number},{split}" for word in ("one", "two")]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    keys = (f"data.videos={tmp_path}/videos", f"data.captions={tmp_path}/captions.csv")

    def prepared(*overrides: str) -> tuple[dict[str, object], Manifest]:
        result = prepare.run(parse_config({"name": "noisy"}, [*keys, *overrides]))
        return result, read_manifest(str(result["manifest"]))

    clean, before = prepared()
    assert "noisy_captions" not in clean
    noisy, after = prepared("data.noise=0.4", "data.seed=3")
    assert (noisy["noisy_captions"], noisy["protocol"]) == (16, "own split; 40 % noise, seed 3")
    assert noisy["fingerprint"] != clean["fingerprint"]
    assert sum(sum(row.noisy) for row in after.of_split("train")) == 16
    for split in ("val", "test"):
        assert [row.captions for row in after.of_split(split)] == [
            row.captions for row in before.of_split(split)
        ]
    assert prepared("data.noise=0.4", "data.seed=3")[0]["fingerprint"] == noisy["fingerprint"]
    assert prepared("data.seed=3")[0]["fingerprint"] == clean["fingerprint"]
