"""The table of an evaluation's queries: rank, scores and best candidates of each, as one Parquet file.

Two runs are compared with it, query by query. Any Parquet reader can read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from gare.data.manifest import ManifestRow
from gare.errors import DataError
from gare.retrieval.ranking.ranks import Ranking, Ranks
from gare.storage.files import exists, read_bytes, write_atomically

SCHEMA_VERSION = 1
DIRECTIONS = ("t2v", "v2t")
#: ``video_id`` and ``caption_index`` name a query; a video → text query is a video and has no caption.
#: ``top_video_ids`` are the best videos; for video → text, the videos with the best captions.
_COLUMNS: list[pa.Field[Any]] = [
    pa.field("direction", pa.string()),
    pa.field("video_id", pa.string()),
    pa.field("caption_index", pa.int32()),
    pa.field("caption", pa.string()),
    pa.field("rank", pa.float64()),
    pa.field("true_score", pa.float32()),
    pa.field("top_video_ids", pa.list_(pa.string())),
    pa.field("top_scores", pa.list_(pa.float32())),
]
SCHEMA = pa.schema(_COLUMNS)
_QUERY = ("direction", "video_id", "caption_index", "caption")


@dataclass(frozen=True)
class QueryTable:
    """The queries of one evaluation.

    Attributes:
        table: of ``SCHEMA``.
        about: facts about the evaluation: ``gallery_sha256``, ``num_videos``, and those that the writer
            added.
        where: the file, for messages.
    """

    table: pa.Table
    about: dict[str, Any]
    where: str = ""

    def of_direction(self, direction: str) -> pa.Table:
        """Returns the rows of t2v or of v2t, in the order of the queries' names."""
        kept = self.table.filter(pc.field("direction") == direction)
        return kept.sort_by([("video_id", "ascending"), ("caption_index", "ascending")])


def false_negative_shares(queries: pa.Table) -> dict[str, float]:
    """Measures how many negatives are known to be false: other videos that have the query's own caption.

    Captions are compared word for word, without case and punctuation, so that the shares are lower bounds.

    Args:
        queries: t2v rows of an evaluation; all captions of the gallery are among them.

    Returns:
        Percent of all negatives as ``false``, and of each text's hardest negative, the best wrong video, as
        ``false_hardest``; nothing if the captions are not known.
    """
    columns = (queries[name].to_pylist() for name in ("video_id", "caption", "top_video_ids"))
    rows = [
        (video, " ".join(re.findall(r"\w+", caption.casefold())), best)
        for video, caption, best in zip(*columns, strict=True)
        if caption and caption.strip()
    ]
    videos_with: dict[str, set[str]] = {}
    for video, words, _ in rows:
        videos_with.setdefault(words, set()).add(video)
    others = len({video for video, _, _ in rows}) - 1
    if others < 1:
        return {}
    false = sum(len(videos_with[words]) - 1 for _, words, _ in rows)
    hardest = [next((one for one in best if one != video), None) for video, _, best in rows]
    false_hardest = sum(one in videos_with[words] for one, (_, words, _) in zip(hardest, rows, strict=True))
    return {
        "false": 100 * false / (len(rows) * others),
        "false_hardest": 100 * false_hardest / len(rows),
    }


def owners_of(rows: Sequence[ManifestRow]) -> torch.Tensor:
    """Returns (N,) int64: the row of each caption, with the captions in the order of the rows."""
    return torch.repeat_interleave(torch.tensor([len(row.captions) for row in rows]))


def query_table(ranks: Ranks, rows: Sequence[ManifestRow], about: Mapping[str, Any]) -> QueryTable:
    """Builds the table of an evaluation.

    Args:
        ranks: of the captions of the rows, in order, and of the rows' videos.
        rows: the gallery.
        about: further facts to keep with it, JSON-serialisable.
    """
    ids = np.array([row.video_id for row in rows], dtype=object)
    owners = owners_of(rows).tolist()
    indices = [index for row in rows for index in range(len(row.captions))]
    captions = [caption for row in rows for caption in row.captions]
    parts = [_rows("t2v", ranks.t2v, ids, list(ids[owners]), indices, captions)]
    if ranks.v2t is not None:
        video_ids = list(ids[ranks.v2t.query.numpy()])
        nothing = [None] * len(video_ids)
        parts.append(_rows("v2t", ranks.v2t, ids, video_ids, nothing, nothing))
    digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
    said = {**about, "num_videos": len(rows), "num_texts": len(captions), "gallery_sha256": digest}
    return QueryTable(pa.concat_tables(parts), said)


def _rows(
    direction: str,
    ranking: Ranking,
    ids: np.ndarray,
    video_ids: Sequence[str],
    indices: Sequence[int | None],
    captions: Sequence[str | None],
) -> pa.Table:
    candidates = [[ids[one] for one in best if one >= 0] for best in ranking.candidates.tolist()]
    scores = [list(row[: len(best)]) for row, best in zip(ranking.scores.numpy(), candidates, strict=True)]
    columns = {
        "direction": [direction] * len(video_ids),
        "video_id": video_ids,
        "caption_index": indices,
        "caption": captions,
        "rank": ranking.rank.numpy(),
        "true_score": ranking.own_score.float().numpy(),
        "top_video_ids": candidates,
        "top_scores": scores,
    }
    return pa.table(columns, schema=SCHEMA)


def write_queries(table: QueryTable, uri: str) -> None:
    """Writes the table as one Parquet file, whole or not at all; ``about`` is in its metadata.

    Raises:
        DataError: if it cannot be written.
    """
    metadata = {"schema_version": str(SCHEMA_VERSION), "about": json.dumps(table.about)}
    sink = pa.BufferOutputStream()
    pq.write_table(table.table.replace_schema_metadata(metadata), sink, compression="zstd")
    write_atomically(uri, sink.getvalue().to_pybytes())


def read_queries(uri: str) -> QueryTable:
    """Reads a table back.

    Raises:
        DataError: if it is missing, not Parquet or not a table of queries.
    """
    if not exists(uri):
        raise DataError("there are no ranks", where=uri, accepted="run pipelines/evaluate.py for this run")
    accepted = f"ranks of schema {SCHEMA_VERSION}, written by pipelines/evaluate.py"
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(uri)))
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if metadata.get("schema_version") != str(SCHEMA_VERSION):
            raise ValueError(f"its schema version is {metadata.get('schema_version')}")
        about = json.loads(metadata["about"])
        table = table.replace_schema_metadata(None).cast(SCHEMA)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot be used: {error}", where=uri, accepted=accepted) from error
    return QueryTable(table, about, uri)


def require_same_queries(first: QueryTable, second: QueryTable) -> None:
    """Refuses two evaluations with different queries or galleries.

    Raises:
        DataError: naming the difference: gallery, queries by name, or their wording.
    """
    faults = []
    if first.about["gallery_sha256"] != second.about["gallery_sha256"]:
        faults.append(
            f"the galleries differ ({first.about['num_videos']} and {second.about['num_videos']} videos)"
        )
    for key in ("variant", "split"):
        if first.about.get(key) != second.about.get(key):
            faults.append(f"{key} is {first.about.get(key)!r} and {second.about.get(key)!r}")
    queries, others = ({_name(row): row["caption"] for row in _names(table)} for table in (first, second))
    for said, names in (
        ("only the first asks", sorted(set(queries) - set(others))),
        ("only the second asks", sorted(set(others) - set(queries))),
        (
            "of other wording are",
            sorted(name for name in set(queries) & set(others) if queries[name] != others[name]),
        ),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults.append(f"{said} {', '.join(names[:3])}{more}")
    if faults:
        raise DataError(
            f"has other queries than {second.where or 'the second run'}: {'; '.join(faults)}",
            where=first.where or "the first run",
            accepted="two evaluations of the same split of the same manifest",
        )


def _names(table: QueryTable) -> list[dict[str, Any]]:
    return table.table.select(list(_QUERY)).to_pylist()


def _name(row: Mapping[str, Any]) -> str:
    caption = "" if row["caption_index"] is None else f" caption {row['caption_index']}"
    return f"{row['direction']} {row['video_id']}{caption}"
