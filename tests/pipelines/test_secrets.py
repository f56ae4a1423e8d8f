"""Secrets of the environment, and of links, are in nothing that a run writes: planted, then searched for."""

from __future__ import annotations

import base64
import csv
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray

from cluster.layout import Layout, layout
from pipelines import evaluate, extract, prepare, train
from tests.helpers.pipelines import in_process, tiny
from tests.helpers.servers import Site

#: What the tests' environment holds, the driver's as well as every worker's.
PLANTED = (
    *("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    "PGPASSWORD",
)
#: Of presigned links.
SIGNATURE = "5f0c1d7be2a94630a1signature"
CLIPS = (
    "realshort.mp4",
    "video_90.mov",
    "sample_mpeg4.mp4",
    "asl_book.mkv",
    "newtonscradle.gif",
    "test_card_av1.mkv",
)


def forms_of(secret: str) -> re.Pattern[bytes]:
    """A secret as it is, percent-encoded, as UTF-16 and in the three alignments of base64."""
    plain = secret.encode()
    forms = {plain, urllib.parse.quote(secret, safe="").encode(), secret.encode("utf-16-le")}
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + plain)
        # The digits at both ends also depend on what stands beside it.
        forms.add(whole[4 if shift else 0 : len(whole) // 4 * 4 - 4])
    return re.compile(b"|".join(map(re.escape, forms)))


def content_of(path: Path) -> Iterator[bytes]:
    """A file's bytes, and of compressed ones what is in them."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        yield str(file.schema_arrow.metadata).encode() + str(file.metadata.metadata).encode()
        for column in file.schema_arrow.names:
            yield str(file.read(columns=[column]).slice(0, 50).to_pylist()).encode()


def places_of(secret: str, *folders: Path) -> list[str]:
    """Files that hold a secret."""
    form = forms_of(secret)
    files = (
        path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    )
    return [str(path) for path in files if any(form.search(content) for content in content_of(path))]


@pytest.fixture
def settings(shared: Path, site: Site, tmp_path: Path) -> tuple[str, ...]:
    """Real clips behind presigned links, one of them gone, as a data set of its own."""
    captions = tmp_path / "captions.csv"
    with captions.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["video", "caption", "split"])
        for number, name in enumerate(CLIPS):
            split = "train" if number < 4 else ("val", "test")[number - 4]
            site.files[f"/{name}"] = (shared / "data" / "videos" / name).read_bytes()
            writer.writerow([f"{site.url}/{name}?X-Amz-Signature={SIGNATURE}", f"what is in {name}", split])
        writer.writerow([f"{site.url}/gone.mp4?X-Amz-Signature={SIGNATURE}", "nothing", "train"])
    return (
        *("name=secrets", "data.benchmark=folder", f"data.captions={captions}"),
        *("sources.private_addresses=true", "sources.retries=1", "sources.backoff_s=0"),
        *("extract.max_failed_fraction=0.5", "train.batch_size=4", "train.epochs=1"),
        *("cluster.train_workers=1", "extract.workers=1"),
    )


def test_the_search_finds_what_is_there(tmp_path: Path, places: Layout, benchmark: dict[str, Any]) -> None:
    """A search that finds nothing, whatever is there, protects nobody."""
    secret = "hush-e6b1f0"
    shown = [
        secret,
        f"x{urllib.parse.quote(secret)}",
        *(base64.b64encode(b"u" * n + secret.encode() + b"xyz").decode() for n in range(3)),
    ]
    for number, text in enumerate(shown):
        (tmp_path / f"{number}.log").write_text(f"line\n{text}\n")
    assert len(places_of(secret, tmp_path)) == len(shown)
    assert places_of("another-one", tmp_path) == []
    # Ids are in compressed pages of the store, captions in those of the manifest.
    assert places.manifest in places_of("circle", Path(places.data))
    frames = Path(places.frames)
    assert any("/data/part-" in place for place in [*places_of("pyav", frames), *places_of("decord", frames)])


def test_no_secret_is_written(
    settings: tuple[str, ...],
    trained: dict[str, Any],
    root: Path,
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Outputs and logs are read, copied and kept by more people and for longer than a secret may be known."""
    said = ""
    for step in (prepare, extract, train, evaluate):
        answer = in_process(capsys, step.run, "--config", tiny_yaml, *settings)
        assert answer.status == 0, answer.stderr
        said += answer.stdout + answer.stderr
    assert "gone" in said
    places = layout(tiny("name=secrets"))
    for written in (
        places.manifest,
        f"{places.frames}/_META.json",
        f"{places.checkpoint('first')}/trainer.pt",
    ):
        assert Path(written).exists()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert (session / "logs").is_dir()
    commands = [" ".join(one.cmdline()).encode() for one in psutil.Process().children(recursive=True)]
    for name, secret in [*((name, os.environ[name]) for name in PLANTED), ("signature", SIGNATURE)]:
        found = places_of(secret, root, session)
        if name == "signature":  # without it the link leads nowhere
            assert places.manifest in found
            found.remove(places.manifest)
        assert found == [], name
        form = forms_of(secret)
        assert not form.search(said.encode()), name
        assert not any(form.search(command) for command in commands), name
