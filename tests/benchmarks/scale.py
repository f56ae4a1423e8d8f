"""``make bench-scale``: CPU seconds, peak memory and requests of 1,000 to 1,000,000 clips, local and on S3.

For each size a manifest and a frame store of tiny rows are generated, 1,000 a part. Then fresh processes read
the manifest and plan extraction into an empty store and into the full one; open the store as a loader does
and load a first batch; and do that on an S3 server of this machine, whose requests are counted. All parts
have the columns of one part but an index of their own; nothing else is read of them here. Prints a table on
stderr and one JSON line on stdout, and draws the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

#: Limits at 1,000,000 clips.
BARS = {
    "plan_cpu_s": 60,
    "driver_mb": 2000,
    "loader_growth_mb": 300,
    "requests_a_part": 2,
    "requests_a_clip": 3,
}
SIZES = (1_000, 10_000, 100_000, 1_000_000)
ROWS_A_PART, BATCH = 1_000, 64
NUM_FRAMES, SIDE_PX = 1, 8


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def video_id(number: int) -> str:
    return f"video {number:010d}"


def generate(folder: Path, count: int) -> None:
    """Writes a manifest of so many clips and a store that holds them."""
    from gare.config import ExtractConfig
    from gare.data.manifest import Manifest, ManifestRow, write_manifest
    from tests.helpers.stores import describe_store

    rows = (
        ManifestRow(video_id(number), uri_of(number), None, None, "train", (f"a caption of clip {number}",))
        for number in range(count)
    )
    write_manifest(Manifest(tuple(rows), "generated", "own"), str(folder / "manifest.parquet"))
    extract = ExtractConfig(num_frames=NUM_FRAMES, image_size=SIDE_PX)
    describe_store(str(folder / "store"), extract)
    (folder / "store" / "data").mkdir()
    (folder / "empty").mkdir()
    for first in range(0, count, ROWS_A_PART):
        name, data = encoded_part(first, min(ROWS_A_PART, count - first))
        (folder / "store" / "data" / name).write_bytes(data)


def uri_of(number: int) -> str:
    return f"/videos/of/a/collection/{number:010d}.mp4"


def version_of(number: int) -> str:
    return hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()


_TEMPLATES: dict[int, tuple[bytes, pa.Table]] = {}


def encoded_part(first: int, count: int) -> tuple[str, bytes]:
    """Returns the name and the bytes of a part: those of one that is encoded once, with another index."""
    from gare.config import ExtractConfig
    from gare.data.store.contents import frame_schema
    from gare.data.store.part_index import INDEX, _entries, _entry, index_table, packed_index
    from gare.data.store.parts import CHECKSUM, encode_part, table_of
    from tests.helpers.stores import random_frames, stored_row

    if count not in _TEMPLATES:
        extract = ExtractConfig(num_frames=NUM_FRAMES, image_size=SIDE_PX)
        frames = random_frames(extract, np.random.default_rng(0), 1)
        row = stored_row(extract, "", frames)
        rows = [row | {"video_id": video_id(number)} for number in range(count)]
        table = table_of(rows, frame_schema(extract))
        _TEMPLATES[count] = bytes(encode_part("data", "part-template.parquet", table)), index_table(table)
    data, index = _TEMPLATES[count]
    numbers = range(first, first + count)
    changed = {"video_id": map(video_id, numbers), "source_version": map(version_of, numbers)}
    for name, values in changed.items():
        place = index.column_names.index(name)
        index = index.set_column(place, index.schema.field(name), pa.array(list(values)))
    name = hashlib.sha256(str(first).encode()).hexdigest()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer, found = data[start:-8], _entries(data[start:-8])
    for key, value in ((INDEX, packed_index([index])), (CHECKSUM, name)):
        footer = footer.replace(_entry(key, found[key].decode()), _entry(key, value))
    whole = data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    return f"part-{name[:20]}.parquet", whole


def plan(folder: Path) -> None:
    """Reads the manifest, plans extraction into an empty store and into the full one, as a driver does."""
    from gare.data.manifest import read_manifest
    from gare.data.videos import FileVersion
    from gare.extract.comparison import compare
    from gare.extract.frame_writer import cut_into_parts

    manifest = read_manifest(str(folder / "manifest.parquet"))
    # What a source answers; each tenth file is another one.
    versions: dict[str, Any] = {
        row.uri: FileVersion(1000, version_of(number) if number % 10 else "another")
        for number, row in enumerate(manifest.rows)
    }
    found = compare(str(folder / "store"), manifest.rows, versions, retry_failed=False)
    count = len(manifest.rows)
    assert found.counts["unchanged"] == count - len(found.pending) == count - -(-count // 10), found.counts
    del found
    found = compare(str(folder / "empty"), manifest.rows, versions, retry_failed=False)
    assert found.counts["new"] == count
    parts = cut_into_parts(found.pending, 16, ROWS_A_PART)
    assert sum(map(len, parts)) == count


def write_loader(folder: Path) -> None:
    """Writes what a training worker sends to its loaders, and what they share."""
    from gare.config import TrainConfig
    from gare.data.manifest import read_manifest
    from gare.data.store.clip_places import Ids
    from gare.train.input.loader import WorkerBatches
    from gare.train.input.plan import plan_run

    rows = read_manifest(str(folder / "manifest.parquet")).rows
    train = TrainConfig(batch_size=BATCH, epochs=5)
    planned = plan_run([len(row.captions) for row in rows], 0, train, rank=0, world_size=1)
    sent = WorkerBatches(planned, {"train": Ids.of([row.video_id for row in rows]), "val": Ids.of([])})
    (folder / "loader.pickle").write_bytes(pickle.dumps(sent))


def load(folder: Path, store: str) -> None:
    """Opens a store and loads the first batch, as a loader does; says each when it is done."""
    from gare.train.input.loader import FrameLoader
    from gare.train.input.tokens import CaptionTokens

    sent = pickle.loads((folder / "loader.pickle").read_bytes())  # written by this program, a moment ago
    count = len(sent.ids["train"])
    # Tokens of all captions, which loaders share, are no memory of their own.
    lengths = np.broadcast_to(np.uint16(4), (count,))
    shared = np.broadcast_to(np.zeros(32, np.uint16), (count, 32))
    tokens = {"train": CaptionTokens(shared, lengths, np.arange(count + 1))}
    loader = FrameLoader(store, sent, tokens)
    assert len(loader.reader.places) == count
    sys.stdout.write("opened\n")
    sys.stdout.flush()
    sys.stdin.readline()
    arrays = loader(0, 0, BATCH)
    assert arrays["frames"].shape == (BATCH, NUM_FRAMES, SIDE_PX, SIDE_PX, 3)
    assert arrays["frames"].any()


def measured(
    task: str, folder: Path, store: str = "", opened: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Runs a task in a fresh process; returns its CPU seconds, peak MB and seconds."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--task", task, "--folder", str(folder), store]
    lines = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if line == "opened\n":
                opened()
                process.stdin.write("\n")
                process.stdin.flush()
    if process.returncode:
        raise RuntimeError(f"{task} ended with status {process.returncode}")
    found: dict[str, float] = json.loads(lines[-1])
    return found | {"seconds": time.monotonic() - started}


def run_task(task: str, folder: Path, store: str) -> None:
    """Runs a task and prints the CPU seconds and the peak memory of this process."""
    tasks: dict[str, Callable[[], None]] = {
        "generate": lambda: generate(folder, int(store)),
        "plan": lambda: plan(folder),
        "write_loader": lambda: write_loader(folder),
        "load": lambda: load(folder, store),
    }
    tasks[task]()
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Not ru_maxrss, which may be that of the parent.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    sys.stdout.write(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "peak_mb": peak / 1e6}) + "\n")


@contextmanager
def counted_s3() -> Iterator[Any]:
    """Yields a proxy before an S3 server, which counts requests; the environment names it."""
    import logging

    from tests.helpers.servers import CREDENTIALS, DroppingProxy, s3_server

    logging.getLogger("werkzeug").disabled = True
    with s3_server() as upstream:
        proxy = DroppingProxy(upstream, 0)
        before = dict(os.environ)
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=proxy.url)
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
            os.environ.pop(name, None)
        try:
            yield proxy
        finally:
            proxy.close()
            os.environ.clear()
            os.environ.update(before)


def measure_s3(folder: Path, proxy: Any, parts: int) -> dict[str, float]:
    """Copies the store to S3 and counts the requests of opening it, and of the first batch."""
    import boto3

    client: Any = boto3.client("s3", region_name="us-east-1")
    bucket = f"scale{parts}"
    client.create_bucket(Bucket=bucket)
    for file in sorted((folder / "store").rglob("*")):
        if file.is_file():
            key = f"store/{file.relative_to(folder / 'store')}"
            client.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())
    proxy.requests.clear()
    seen: dict[str, list[str]] = {}
    found = measured(
        "load",
        folder,
        f"s3://{bucket}/store",
        lambda: (seen.update(open=list(proxy.requests)), proxy.requests.clear())[1],
    )
    seen["batch"] = list(proxy.requests)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", ()):
            client.delete_object(Bucket=bucket, Key=entry["Key"])
    client.delete_bucket(Bucket=bucket)
    of_parts = [line for line in seen["open"] if ".parquet" in line.split(" ")[1].split("?")[0]]
    return {
        "requests_a_part": len(of_parts) / parts,
        "other_requests": float(len(seen["open"]) - len(of_parts)),
        "requests_a_clip": len(seen["batch"]) / BATCH,
        "s3_open_cpu_s": found["cpu_s"],
        "s3_loader_mb": found["peak_mb"],
        "s3_seconds": found["seconds"],
    }


def measure(count: int, folder: Path, proxy: Any) -> dict[str, float]:
    """Measures one size."""
    folder.mkdir()
    made = measured("generate", folder, str(count))
    planned = measured("plan", folder)
    worker = measured("write_loader", folder)
    loaded = measured("load", folder, str(folder / "store"))
    found = {
        "clips": float(count),
        "generate_s": made["seconds"],
        "plan_cpu_s": planned["cpu_s"],
        "driver_mb": planned["peak_mb"],
        "worker_mb": worker["peak_mb"],
        "loader_cpu_s": loaded["cpu_s"],
        "loader_mb": loaded["peak_mb"],
    }
    if proxy:
        found |= measure_s3(folder, proxy, -(-count // ROWS_A_PART))
    return found


def draw(rows: list[dict[str, float]], file: Path) -> None:
    """Draws CPU seconds, peak memory and requests against the number of clips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "CPU seconds": {"plan_cpu_s": "plan", "loader_cpu_s": "loader", "s3_open_cpu_s": "loader on S3"},
        "peak memory, MB": {"driver_mb": "driver", "loader_mb": "loader", "s3_loader_mb": "loader on S3"},
        "requests to S3": {
            "requests_a_part": "a part, to open the store",
            "requests_a_clip": "a clip, first batch",
        },
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, label in lines.items():
            points = [(row["clips"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
            if name in BARS:
                axis.axhline(
                    BARS[name], linestyle=":", color=axis.lines[-1].get_color(), label=f"{label}: bar"
                )
        axis.set(xscale="log", title=title, xlabel="clips", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


def judge(rows: list[dict[str, float]]) -> dict[str, float]:
    """Returns the figures of the largest size that have a bar."""
    last = rows[-1]
    found = {name: last[name] for name in BARS if name in last}
    memory = [max(row["loader_mb"], row.get("s3_loader_mb", 0.0)) for row in (rows[0], last)]
    return found | {"loader_growth_mb": memory[1] - memory[0]}


def main(arguments: list[str] | None = None) -> None:
    """Runs all sizes, or one task in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of clips")
    parser.add_argument("--local", action="store_true", help="without S3")
    parser.add_argument("--picture", type=Path, help="file to draw to")
    parser.add_argument("--folder", type=Path, help="of the task")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("store", nargs="?", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.task:
        run_task(options.task, options.folder, options.store)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name, counted_s3() as proxy:
        for count in map(int, options.sizes.split(",")):
            rows.append(measure(count, Path(name) / str(count), None if options.local else proxy))
            say(", ".join(f"{key} {value:,.1f}" for key, value in rows[-1].items()))
    judged = judge(rows)
    for key, value in judged.items():
        say(f"  {key:<20} {value:>10,.1f}, bar {BARS[key]:,}")
    if options.picture:
        draw(rows, options.picture)
    sys.stdout.write(json.dumps({"rows": rows, "judged": judged, "bars": BARS}) + "\n")


if __name__ == "__main__":
    main()
