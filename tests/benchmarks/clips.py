"""Generated clips of a usual kind: H.264, 320 × 240 pixels, 10 to 20 s, a keyframe every 250 frames."""

from __future__ import annotations

import multiprocessing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, FPS = 320, 240, 25


def write_clips(folder: Path, count: int, seed: int, processes: int) -> list[Path]:
    """Writes the missing clips; the same seed gives the same clips."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"seed{seed}-{index:04}.mp4" for index in range(count)]
    missing = [(path, seed, index) for index, path in enumerate(paths) if not path.exists()]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_write_clip, missing, chunksize=1)
    return paths


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draws a picture with structure at all scales, like a photograph."""
    picture = np.zeros((height, width, 3))
    for cells in (3, 8, 24, 64):
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture += np.asarray(fine, dtype=float) / cells**0.5
    picture -= picture.min()
    return (picture * (255 / picture.max())).astype(np.uint8)


def _write_clip(path: Path, seed: int, index: int) -> None:
    """Writes a clip: a camera drifts over a texture, an object moves across it, with sensor noise."""
    rng = np.random.default_rng([seed, index])
    scene = _texture(rng, WIDTH + 160, HEIGHT + 120)
    thing = _texture(rng, 72, 72)
    noise = rng.normal(0, 3, (4, *scene.shape[:2], 1))
    noisy = [np.clip(scene + one, 0, 255).astype(np.uint8) for one in noise]
    drift, speed = rng.uniform(0.1, 0.6, 2), rng.uniform(1, 5, 2)
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        options = {"preset": "veryfast", "crf": "23", "threads": "1", "g": "250"}
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(int(rng.uniform(10, 20) * FPS)):
            left = int(80 + 79 * np.sin(number / 25 * drift[0]))
            top = int(60 + 59 * np.sin(number / 25 * drift[1]))
            picture = noisy[number % 4][top : top + HEIGHT, left : left + WIDTH].copy()
            x = int(abs((number * speed[0]) % (2 * (WIDTH - 72)) - (WIDTH - 72)))
            y = int(abs((number * speed[1]) % (2 * (HEIGHT - 72)) - (HEIGHT - 72)))
            picture[y : y + 72, x : x + 72] = thing
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(path)
