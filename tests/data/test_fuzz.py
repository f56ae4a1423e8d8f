"""Damaged files: each ends as a clip of real pictures or as a failure with its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from gare.data.decode_process import DecodeProcess
from tests.fuzz import damaged_files, outcome, table


def test_damaged_files_neither_crash_nor_hang_nor_give_empty_pictures(
    shared: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Lost otherwise: a night's extraction to one bad download, or a training set with holes in it."""
    clips = [path for path in sorted((shared / "data/videos").iterdir()) if path.stat().st_size < 500_000]
    assert len(clips) > 10
    outcomes: Counter[str] = Counter()
    faults = []
    with DecodeProcess() as process:
        for what, path in damaged_files(rng, clips, 60, tmp_path):
            ended = outcome(process, path)
            outcomes[ended] += 1
            if ended.startswith(("DecoderCrashError", "DecodeTimeoutError", "empty picture")):
                faults.append(f"{what}: {ended}")
        broken = {path.name: outcome(process, path) for path in sorted((shared / "data/broken").iterdir())}
    print(table(outcomes))
    assert not faults
    assert sum(outcomes.values()) == 60
    assert len(outcomes) > 2
    failed = {name for name, ended in broken.items() if ended.startswith("DataError")}
    assert failed == {
        *("README.md", "audio_only.mp4", "text_renamed.mp4", "truncated_70pct_index_last.mp4"),
        *("zero_byte.mp4", "zero_duration.mp4"),
    }
    assert {ended for name, ended in broken.items() if name not in failed} == {"whole", "damaged"}
