"""A contact sheet of stored clips: the frames that the model will see, with their times and captions.

F frames a clip.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence

import matplotlib.font_manager
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gare.data.manifest import ManifestRow
from gare.data.store.frame_reader import FrameReader
from gare.data.store.parts import read_columns
from gare.errors import DataError

INK, FAINT = "#1f2430", "#70767f"
_SIDE_PX, _GAP_PX, _MARGIN_PX, _HEAD_PX, _FOOT_PX = 112, 6, 16, 42, 18
#: Largest number of frames shown of a clip, at equal steps.
_COLUMNS = 12
_ABOUT = ("width_px", "height_px", "fps", "duration_s", "decoder", "note")


def draw_preview(store: str, rows: Sequence[ManifestRow], num_clips: int) -> bytes:
    """Draws stored clips, at equal steps through the manifest, one a line.

    Args:
        store: a frame store.
        rows: of the manifest; rows that the store does not hold are skipped.
        num_clips: clips to show at most.

    Returns:
        A PNG.

    Raises:
        DataError: where there is no frame store, or none of the clips is in it.
    """
    reader = FrameReader(store)
    held = [row for row in rows if row.video_id in reader.places]
    if not held:
        raise DataError("holds none of the clips, so there is nothing to show", where=store)
    chosen = [held[index] for index in np.linspace(0, len(held) - 1, min(num_clips, len(held))).astype(int)]
    columns = min(_COLUMNS, reader.num_frames)
    width = max(640, 2 * _MARGIN_PX + columns * (_SIDE_PX + _GAP_PX))
    line = _HEAD_PX + _SIDE_PX + _FOOT_PX + _GAP_PX
    sheet = Image.new("RGB", (width, 2 * _MARGIN_PX + len(chosen) * line), "white")
    for index, row in enumerate(chosen):
        _draw_clip(sheet, _MARGIN_PX + index * line, reader, row)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _draw_clip(sheet: Image.Image, top: int, reader: FrameReader, row: ManifestRow) -> None:
    frames, mask = reader.read([row.video_id])
    part, position = reader.places[row.video_id]
    about = read_columns(part, ["frame_time_s", *_ABOUT]).slice(position, 1).to_pylist()[0]
    draw = ImageDraw.Draw(sheet)
    room = sheet.width - 2 * _MARGIN_PX
    clip = (
        "" if row.start_s is None and row.end_s is None else f"  clip {row.start_s or 0:g} to {row.end_s} s"
    )
    facts = (
        f"{about['width_px']}×{about['height_px']}  {about['fps']:.4g} fps  {about['duration_s']:.1f} s  "
        f"{about['decoder']}{clip}  {about['note']}"
    )
    _write(draw, (_MARGIN_PX, top), f"{row.video_id}   {facts}", 11, FAINT, room)
    more = f"   (+{len(row.captions) - 1})" if len(row.captions) > 1 else ""
    text = row.captions[0] if row.captions else "(no caption)"
    _write(draw, (_MARGIN_PX, top + 16), f"{text}{more}", 14, INK, room)
    count = int(mask.sum())
    shown = np.unique(np.linspace(0, count - 1, min(count, _COLUMNS)).astype(int))
    for column, index in enumerate(shown):
        left = _MARGIN_PX + column * (_SIDE_PX + _GAP_PX)
        picture = Image.fromarray(frames[0, index])
        picture = picture.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top + _HEAD_PX))
        time = f"{about['frame_time_s'][index]:.2f} s"
        _write(draw, (left, top + _HEAD_PX + _SIDE_PX + 2), time, 11, FAINT, _SIDE_PX)


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size_px: int, colour: str, room_px: int
) -> None:
    """Writes one line of text, cut to the room that it has."""
    text = " ".join(text.split())
    font = _font(size_px)
    if draw.textlength(text, font) > room_px:
        while text and draw.textlength(f"{text} …", font) > room_px:
            text = text[:-1]
        text = f"{text} …"
    draw.text(place, text, colour, font)


@functools.cache
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), size_px)
