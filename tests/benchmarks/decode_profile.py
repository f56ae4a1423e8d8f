"""Where the time of one clip goes in the decoding child: probing, decoding by each decoder, resizing, JPEG.

Milliseconds of processor time a clip, which a busy machine disturbs least; medians of calls that take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from gare.data.decode.clip import decode_clip
from gare.data.decode.probe import probe
from gare.data.images import encode_jpeg, prepare_frame


def generate(path: Path, seconds: float = 15.0) -> None:
    """Writes a moving picture of 320×240 at 25 frames per second, H.264 with keyframes every 250 frames."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (60, 200, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "250", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for k in range(int(25 * seconds)):
            left, top = 3 * k % 1200, 2 * k % 240
            rgb = np.ascontiguousarray(scene[top : top + 240, left : left + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path, help="a video; one is generated there if there is none")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    path = options.clip
    if not path.exists():
        generate(path)
    frames = decode_clip(path).frames
    small = [prepare_frame(rgb, 224) for rgb in frames]
    calls: dict[str, Callable[[], Any]] = {
        "probe": lambda: probe(path),
        "whole, auto": lambda: decode_clip(path),
        "whole, pyav": lambda: decode_clip(path, decoder="pyav"),
        "whole, uniform": lambda: decode_clip(path, sampling="uniform"),
        "whole, keyframes": lambda: decode_clip(path, sampling="keyframes"),
        "resize": lambda: [prepare_frame(rgb, 224) for rgb in frames],
        "jpeg": lambda: [encode_jpeg(rgb, 95) for rgb in small],
    }
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            spent[name].append(1000 * (time.process_time() - started))
    found = {name: statistics.median(values[1:]) for name, values in spent.items()}
    for name, milliseconds in found.items():
        sys.stderr.write(f"{name:<18}{milliseconds:8.1f} ms\n")
    sys.stdout.write(json.dumps({"decoder": decode_clip(path).decoder, "ms": found}) + "\n")


if __name__ == "__main__":
    main()
