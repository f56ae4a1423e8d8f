"""Paragraph retrieval: all sentences of a video joined in order to one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gare.data.benchmarks.reader import BenchmarkClip, Deviation, VideoAnnotations, names_of


def paragraph_clips(
    split: str,
    listed: Mapping[str, VideoAnnotations],
    sources: Sequence[Mapping[str, VideoAnnotations]],
    *,
    start_s: float | None = None,
    end_s: float | None = None,
) -> tuple[list[BenchmarkClip], list[Deviation]]:
    """Builds the clips of a split, each with its paragraph, and lists their deviations.

    Args:
        split: its name.
        listed: the videos of the split; empty: those of the sources.
        sources: sentences of videos, the most reliable first; a later source is used for videos missing in
            earlier ones.
        start_s: of all clips.
        end_s: of all clips.
    """
    members = listed or {name: video for source in sources for name, video in source.items()}
    clips = []
    silent, unlike = [], []
    for name, video in members.items():
        found = [source[name] for source in [{name: video}, *sources] if name in source]
        paragraphs = [" ".join(video.texts) for video in found if video.texts]
        if not paragraphs:
            silent.append(name)
            continue
        if len(set(paragraphs)) > 1:
            unlike.append(name)
        written = [written for video in found for written in video.names]
        clips.append(BenchmarkClip(name, names_of(name, *written), split, (paragraphs[0],), start_s, end_s))
    unlisted = {name for source in sources for name in source} - members.keys()
    found_odd = (
        (f"{split} videos without sentences, left out", silent),
        (f"{split} videos with sentences that the list does not name, left out", unlisted),
        (f"{split} videos whose files give different paragraphs, the first taken", unlike),
    )
    return clips, [Deviation(what, tuple(sorted(ids))) for what, ids in found_odd if ids]


def odd_times(
    split: str, videos: Mapping[str, VideoAnnotations], remedies: tuple[str, str]
) -> list[Deviation]:
    """Lists videos whose times run backwards or end after the video.

    Args:
        split: its name.
        videos: with their times.
        remedies: what is done about either case, in words.
    """
    backwards = sorted(name for name, video in videos.items() if any(a > b for a, b in video.times))
    late = sorted(
        name
        for name, video in videos.items()
        if video.duration_s is not None and any(max(pair) > video.duration_s for pair in video.times)
    )
    found = (
        (f"{split} videos with a time that runs backwards, {remedies[0]}", backwards),
        (f"{split} videos with a time after the end of the video, {remedies[1]}", late),
    )
    return [Deviation(what, tuple(ids)) for what, ids in found if ids]
