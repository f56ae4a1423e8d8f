"""Encoding of a scene as an H.264 mp4 file that is complete or does not exist."""

from __future__ import annotations

import uuid
from pathlib import Path

import av
from av.error import FFmpegError

from gare.data.synthetic.render import render_frame
from gare.data.synthetic.scene import Scene
from gare.errors import DataError


def encode_video(scene: Scene, path: Path) -> None:
    """Writes the scene to an mp4 file: H.264, yuv420p, the scene's size, rate and number of frames.

    Raises:
        DataError: if the file cannot be written or encoded.
    """
    # Not *.mp4, so that a file left by an interrupted run is not taken for a video.
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial")
    try:
        _encode(scene, partial)
        partial.replace(path)
    except (FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"cannot be encoded: {error}",
            where=str(path),
            accepted="a writable folder with room, and PyAV with libx264",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _encode(scene: Scene, path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        # One thread, because x264's output depends on their number.
        options = {"preset": "superfast", "crf": "20", "threads": "1", "g": str(2 * scene.fps)}
        stream = container.add_stream("libx264", rate=scene.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.thread_count = 1
        for index in range(scene.num_frames):
            frame = av.VideoFrame.from_ndarray(render_frame(scene, index / scene.fps), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
