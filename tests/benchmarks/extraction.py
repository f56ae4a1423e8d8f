"""``make bench-extract``: the whole extraction step against the decoder's own rate, and where time goes.

The plain side decodes, resizes and encodes the same clips in a pool of as many processes; it writes nothing.
The whole step is ``pipelines.extract``: manifest in, Parquet out. Both take turns within one run. Prints
tables on stderr and one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.layout import layout
from cluster.runtime.session import ray_session
from gare.config import Config, parse_config
from gare.data.decode.clip import decode_clip
from gare.data.decode.probe import probe
from gare.data.images import encode_jpeg, prepare_frame
from gare.data.manifest import Manifest, ManifestRow, write_manifest
from gare.storage.files import delete_tree
from pipelines import extract
from tests.benchmarks.clips import write_clips

Table = dict[str, Any]
#: Real clips so long or large that the other processes would be idle at the end.
LEFT_OUT = ("slides_talk.mp4",)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def plain_clip(path: str) -> dict[str, float]:
    """Returns the seconds by stage of the decoder alone for a clip, with the default store settings."""
    settings = Config().extract
    seconds = Counter[str]()

    def prepare(rgb: Any) -> Any:
        started = time.perf_counter()
        picture = prepare_frame(rgb, settings.image_size)
        seconds["resize"] += time.perf_counter() - started  # type: ignore[assignment]
        return picture

    started = time.perf_counter()
    clip = decode_clip(path, sample_fps=settings.sample_fps, num_frames=settings.num_frames, prepare=prepare)
    decoded = time.perf_counter()
    jpegs = [encode_jpeg(frame, settings.jpeg_quality) for frame in clip.frames]
    seconds["jpeg"] = time.perf_counter() - decoded  # type: ignore[assignment]
    seconds["decode"] = decoded - started - seconds["resize"]  # type: ignore[assignment]
    return {**seconds, "frames": len(jpegs)}


def plain_probe(path: str) -> float:
    """Returns the seconds of the probe, which are part of the decoder's time above."""
    started = time.perf_counter()
    probe(path)
    return time.perf_counter() - started


def plain(paths: Sequence[str], processes: int) -> Table:
    """Measures the decoder alone, in a pool of processes that have already started and imported."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(plain_clip, paths[: 4 * processes], chunksize=1)
        started = time.perf_counter()
        stages = list(pool.imap_unordered(plain_clip, paths, chunksize=1))
        seconds = time.perf_counter() - started
        probes = sum(pool.imap_unordered(plain_probe, paths, chunksize=1))
    names = ("decode", "resize", "jpeg")
    return {
        "seconds": seconds,
        "videos_per_s": len(paths) / seconds,
        "frames_per_s": sum(stage["frames"] for stage in stages) / seconds,
        "stages": {name: sum(stage[name] for stage in stages) for name in names} | {"probe": probes},
    }


def whole(paths: Sequence[str], processes: int, root: str) -> Table:
    """Measures the step as a user runs it, in a running Ray; the start of its actors is listed apart."""
    name = f"bench{time.monotonic_ns()}"
    config = parse_config({"name": name, "storage": {"root": root}, "cluster": {"num_cpus": processes}})
    rows = tuple(
        ManifestRow(f"{index:05}", path, None, None, "train", ("a clip",)) for index, path in enumerate(paths)
    )
    write_manifest(Manifest(rows, "bench", "own"), layout(config).manifest)
    with ray_session(config.cluster):
        started = time.perf_counter()
        result = extract.run(config)
        seconds = time.perf_counter() - started
    delete_tree(layout(config).data)
    assert result["videos"] + len(result["failed"]) == len(paths), result
    start_s = result["timing"]["actors_start_s"]
    return {
        "seconds": seconds,
        "actors_start_s": start_s,
        "around_s": seconds - result["timing"]["pool_s"],
        "busy_s": sum(result["stage_seconds"].values()),
        "pool_s": result["timing"]["pool_s"],
        "videos_per_s": len(paths) / (seconds - start_s),
        "stages": result["stage_seconds"],
        "failed": result["failed"],
    }


def compare(name: str, paths: Sequence[str], processes: int, rounds: int, root: str) -> Table:
    """Measures both sides in turns and returns medians."""
    sides: dict[str, list[Table]] = {"plain": [], "whole": []}
    for number in range(rounds):
        sides["plain"].append(plain(paths, processes))
        sides["whole"].append(whole(paths, processes, root))
        ratio = sides["whole"][-1]["videos_per_s"] / sides["plain"][-1]["videos_per_s"]
        say(f"{name}, round {number + 1}: {ratio:.3f} of the decoder's own rate")
    ratios = [
        one["videos_per_s"] / other["videos_per_s"]
        for one, other in zip(sides["whole"], sides["plain"], strict=True)
    ]
    middle = {
        side: sorted(tables, key=lambda table: table["seconds"])[rounds // 2]
        for side, tables in sides.items()
    }
    _print(name, middle["plain"], middle["whole"], len(paths), processes)
    return {"ratio": statistics.median(ratios), "ratios": ratios, "videos": len(paths), **middle}


def _print(name: str, plain: Table, whole: Table, count: int, processes: int) -> None:
    say(f"{name}: {count} clips, {processes} processes")
    say(
        f"  decoder alone {plain['seconds']:8.2f} s  {plain['videos_per_s']:.1f} videos/s "
        f"{plain['frames_per_s']:.0f} frames/s"
    )
    say(f"  whole step    {whole['seconds']:8.2f} s  {whole['videos_per_s']:.1f} videos/s, Ray's start apart")
    say("  seconds of the processes by stage, summed:")
    inside = plain["stages"]
    lines = {
        "fetch": (0.0, whole["stages"].get("fetch", 0.0)),
        "probe": (inside["probe"], None),
        "decode": (inside["decode"] - inside["probe"], None),
        "resize": (inside["resize"], None),
        "JPEG": (inside["jpeg"], None),
        "all of these": (inside["decode"] + inside["resize"] + inside["jpeg"], whole["stages"]["decode"]),
        "Parquet": (0.0, whole["stages"]["parquet"]),
        "write": (0.0, whole["stages"]["write"]),
        "waiting, Ray": (
            None,
            processes * (whole["pool_s"] - whole["actors_start_s"]) - whole["busy_s"],
        ),
    }
    say(f"    {'':14} {'alone':>8} {'whole':>8}")
    for stage, values in lines.items():
        cells = " ".join(f"{'' if value is None else f'{value:.2f}':>8}" for value in values)
        say(f"    {stage:<14} {cells}")
    say(
        f"  before and after the pool (manifest, comparison, MLflow, counts) {whole['around_s']:.2f} s; "
        f"start of the actors {whole['actors_start_s']:.2f} s"
    )


def main() -> None:
    """Runs all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=400, help="generated clips")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both sides")
    parser.add_argument("--processes", type=int, default=2, help="decoding processes of either side")
    parser.add_argument("--seed", type=int, default=0, help="of the generated clips")
    parser.add_argument("--videos", type=Path, help="folder that keeps the generated clips")
    parser.add_argument("--repeat-real", type=int, default=4, help="times that each real clip is taken")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shared = Path(os.environ.get("GARE_SHARED") or Path(__file__).parents[3] / "shared") / "data" / "videos"
    with tempfile.TemporaryDirectory() as folder:
        videos = options.videos or Path(folder) / "videos"
        started = time.perf_counter()
        made = write_clips(videos, options.clips, options.seed, options.processes)
        say(f"made {len(made)} clips in {time.perf_counter() - started:.0f} s")
        paths = [str(path.absolute()) for path in made]
        sets = {"generated": paths}
        real = sorted(str(path.absolute()) for path in shared.glob("*") if path.suffix != ".json")
        real = [path for path in real if Path(path).name not in LEFT_OUT] * options.repeat_real
        if real:
            sets["real"] = real
        found = {
            name: compare(name, paths, options.processes, options.rounds, f"{folder}/root")
            for name, paths in sets.items()
        }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
