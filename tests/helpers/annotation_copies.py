"""Reader of real annotation files, and writer of equivalent copies in other formats."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gare.config.data import DataConfig
from gare.data.benchmarks.registry import Benchmark, read_benchmark

#: Writer of a copy: from content that was read the plain way to files by name.
Copy = Callable[[Any, np.random.Generator], dict[str, Any]]


def text_of(folder: Path, name: str) -> str:
    """Returns the content of an annotation file, decompressed."""
    path = folder / name
    data = path.read_bytes() if path.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    return data.decode("utf-8-sig")


def json_of(folder: Path, name: str) -> Any:
    return json.loads(text_of(folder, name))


def lines_of(folder: Path, name: str) -> list[str]:
    return text_of(folder, name).split()


def table_of(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text_of(folder, name), newline="")))


def with_single_blanks(text: str) -> str:
    return " ".join(text.split())


def without_ending(name: str) -> str:
    """Returns a file's name without what follows its last dot."""
    return name.rsplit(".", 1)[0]


def as_table(
    header: Sequence[str] | None, rows: Iterable[Sequence[str]], delimiter: str = ",", end: str = "\n"
) -> str:
    """Formats rows as CSV with the given delimiter and line ends, quoted if needed."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    writer.writerows([header] if header else [])
    writer.writerows(rows)
    return out.getvalue()


def as_lines(entries: Iterable[Any]) -> str:
    """Formats entries as JSON Lines."""
    return "\n".join(json.dumps(entry) for entry in entries) + "\n"


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Writes files: texts and bytes as they are, all else as JSON; names in .gz are compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, (bytes, str)) else json.dumps(content)
        data = data.encode() if isinstance(data, str) else data
        (folder / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    return folder


def read(benchmark: str, annotations: Path, **keys: Any) -> Benchmark:
    """Reads the benchmark as ``prepare`` does; without videos unless they are given."""
    return read_benchmark(DataConfig(benchmark=benchmark, annotations=str(annotations), **keys))


def assert_same_benchmark(original: Benchmark, copy: Path) -> None:
    """Reads a copy of the annotation files, and compares the benchmark with the one of the real files."""
    found = read(original.manifest.benchmark, copy)
    assert found.manifest.fingerprint == original.manifest.fingerprint
    assert found.manifest.protocol == original.manifest.protocol


def captions_of(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    return {row.video_id: row.captions for row in benchmark.manifest.rows}


def deviations_of(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    return {item.what: item.ids for item in benchmark.annotations.deviations}


def counts_of(benchmark: Benchmark) -> dict[str, tuple[int, int]]:
    """Returns the numbers of videos and captions by split."""
    counts = benchmark.manifest.counts
    return {split: (count["videos"], count["captions"]) for split, count in counts.items()}
