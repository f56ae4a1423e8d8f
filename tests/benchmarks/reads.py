"""``make bench-reads``: clips a second that training reads, from each store and decoded on the fly.

The same clips in the same run, by turns, in one process. On the fly is what the released loader does: decord
decodes the frames that the sampling names, Pillow resizes and crops them. Everything ends at what the
training process gets from its loader: uint8 frames, or float16 features. Clips are generated (320 × 240, 10
to 20 s, H.264, a key frame every 250 frames) unless a folder is given. Prints a table on stderr and one JSON
line on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import decord
import numpy as np

from gare.config import Config, parse_config
from gare.data.decode.clip import decode_clip
from gare.data.decode.sampling import equally_spaced
from gare.data.images import prepare_frame
from gare.data.store.contents import IDENTITY, Store, StoreMeta, fingerprint, frame_settings
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.feature_schema import feature_schema, feature_settings, feature_table
from gare.data.store.parts import write_table
from gare.extract.frame_writer import Extractor
from gare.train.input.loader import FeatureLoader, FrameLoader
from gare.train.input.tokens import CaptionTokens
from tests.helpers.plans import listed

#: Minimum ratio to decoding on the fly.
BARS = {"jpeg": 10, "raw": 40, "features": 200}
BATCH, CAPTIONS, ROUNDS = 8, 20, 3
SUFFIXES = {".mp4", ".webm", ".avi", ".mkv", ".mov"}


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def generate(folder: Path, count: int) -> list[Path]:
    """Writes moving clips: a textured picture that shifts, with noise, at 25 frames a second."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / f"clip{number:03d}.mp4"
        base = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            stream.time_base = Fraction(1, 25)
            stream.options = {"g": "250", "preset": "veryfast", "crf": "23"}
            for index in range(25 * int(rng.integers(10, 21))):
                left, top = (3 * index) % 320, (2 * index) % 240
                picture = base[top : top + 240, left : left + 320]
                noise = rng.integers(0, 12, picture.shape, dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(np.minimum(picture, 243) + noise, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        paths.append(path)
    return paths


def frame_store(folder: Path, config: Config, rows: list[dict[str, object]]) -> list[str]:
    """Writes a frame store as extraction does; returns its ids."""
    extractor = Extractor(str(folder), config.extract)
    try:
        for first in range(0, len(rows), config.extract.videos_per_part):
            extractor.write(rows[first : first + config.extract.videos_per_part])
    finally:
        extractor.close()
    settings = frame_settings(config.extract)
    Store(str(folder)).write_meta(StoreMeta("frames", fingerprint(settings), settings, {}, True, "", "0"))
    return list(Store(str(folder)).ids())


def feature_store(folder: Path, config: Config, ids: list[str]) -> None:
    """Writes a feature store of the same clips; its values do not affect the reading speed."""
    rng = np.random.default_rng(0)
    num_frames, width = config.extract.num_frames, config.model.clip.embed_dim
    rows = [
        {
            "video_id": video_id,
            "uri": "",
            "start_s": None,
            "end_s": None,
            "source_bytes": None,
            "source_version": None,
            "num_frames": num_frames,
            "frames": rng.standard_normal((num_frames, width)).astype(np.float16),
            "captions": ["a caption"] * CAPTIONS,
            "num_tokens": [10] * CAPTIONS,
            "text": rng.standard_normal((CAPTIONS, width)).astype(np.float16),
        }
        for video_id in ids
    ]
    write_table(str(folder), "data", feature_table(rows, feature_schema(num_frames, width)), ids)
    settings = feature_settings(config, "")
    Store(str(folder)).write_meta(StoreMeta("features", fingerprint(settings), settings, {}, True, "", "0"))


def on_the_fly(path: Path, num_frames: int, size_px: int) -> np.ndarray:
    """Loads a clip like the released loader; falls back to extraction's decoder if decord cannot."""
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        candidates = np.arange(0, len(reader), max(1, round(reader.get_avg_fps())))
        frames = reader.get_batch(candidates[equally_spaced(len(candidates), num_frames)]).asnumpy()
    except decord.DECORDError:
        return np.stack(
            decode_clip(path, num_frames=num_frames, prepare=partial(prepare_frame, size_px=size_px)).frames
        )
    return np.stack([prepare_frame(frame, size_px) for frame in frames])


def seconds_of(load: Callable[[int], object], numbers: range, least: float = 0.2) -> float:
    """Returns the seconds of one pass over the batches, averaged over passes that take a while together."""
    passes, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < least or not passes:
        for number in numbers:
            load(number)
        passes += 1
    return taken / passes


def measure(videos: list[Path], folder: Path) -> dict[str, object]:
    """Measures clips/s of each way, as medians of rounds in which they take turns."""
    rows: list[dict[str, object]] = [
        {"video_id": path.name, "uri": str(path), **dict.fromkeys(IDENTITY), "attempts": 0} for path in videos
    ]
    configs = {name: parse_config({"extract": {"encoding": name}}) for name in ("jpeg", "raw")}
    held = [set(frame_store(folder / name, config, rows)) for name, config in configs.items()]
    ids = sorted(set.intersection(*held))
    feature_store(folder / "features", configs["jpeg"], ids)
    place = {path.name: path for path in videos}
    order = np.random.default_rng(1).permutation(ids).tolist()
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    extract = configs["jpeg"].extract

    def decode(number: int) -> list[np.ndarray]:
        return [on_the_fly(place[one], extract.num_frames, extract.image_size) for one in batches[number]]

    plan = listed(batches, [[7] * len(batch) for batch in batches])
    tokens = {"train": CaptionTokens.of([["a caption"] * CAPTIONS] * len(plan.ids["train"]), 32)}

    def whole(loader: FrameLoader | FeatureLoader) -> Callable[[int], object]:
        return lambda number: loader(number, 0, len(batches[number]))

    loaders: dict[str, Callable[[int], object]] = {
        "on the fly": decode,
        "jpeg": whole(FrameLoader(str(folder / "jpeg"), plan, tokens)),
        "raw": whole(FrameLoader(str(folder / "raw"), plan, tokens)),
        "features": whole(FeatureLoader(FeatureReader(str(folder / "features")), plan)),
        "features, not in memory": whole(
            FeatureLoader(FeatureReader(str(folder / "features"), cache_mb=0), plan)
        ),
    }
    numbers = range(len(batches))
    rounds: dict[str, list[float]] = {name: [] for name in loaders}
    for name, load in loaders.items():
        if name != "on the fly":
            seconds_of(load, numbers, 0)  # warm-up: fills the system's cache, reads footers
    for _ in range(ROUNDS):
        for name, load in loaders.items():
            rounds[name].append(seconds_of(load, numbers))
    rates = {name: len(ids) / float(np.median(taken)) for name, taken in rounds.items()}
    ratios = {name: rate / rates["on the fly"] for name, rate in rates.items()}
    say(f"{len(ids)} clips of {len(videos)}, batches of {BATCH}, one process")
    for name, rate in rates.items():
        bar = f", bar {BARS[name]}" if name in BARS else ""
        say(f"  {name:<24} {rate:>12,.1f} clips/s {ratios[name]:>10,.1f} ×{bar}")
    return {"clips": len(ids), "clips_per_s": rates, "ratios": ratios, "bars": BARS}


def main() -> None:
    """Runs all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=40, help="clips to generate")
    parser.add_argument("--videos", type=Path, help="a folder of real clips instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.videos:
            videos = sorted(path for path in options.videos.rglob("*") if path.suffix in SUFFIXES)
        else:
            (folder / "videos").mkdir()
            videos = generate(folder / "videos", options.clips)
        found = measure(videos, folder)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
