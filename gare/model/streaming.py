"""Scores of any number of texts and videos, block by block within a memory budget.

N texts, M videos, F frames, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gare.model.budget import MEGABYTE, Budget
from gare.model.factorized.prepared import PreparedVideo
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.scorer import DIRECT_VECTORS, PairScorer

#: Bytes of a block of pairs on a CPU: large enough for products to be efficient, small enough for its cache.
CACHED_BYTES = 32 * MEGABYTE
#: Texts of a block, so that products with the rows of a few videos are large enough to be efficient.
TEXTS_PER_BLOCK = {"cpu": 1024, "cuda": 8192}


def slices(count: int, size: int) -> Iterator[slice]:
    """Yields consecutive slices of at most ``size``."""
    size = max(size, 1)
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


@dataclass(frozen=True)
class BlockSizes:
    """Numbers of texts and videos that are scored at once.

    Attributes:
        owners: contexts whose basis is computed together.
        queries: query embeddings that are mapped to key space together.
        texts: of a block of pairs.
        videos: of a block of pairs.
    """

    owners: int
    queries: int
    texts: int
    videos: int


def count_pair_numbers(scorer: PairScorer, num_frames: int, num_words: int, *, fused: bool = False) -> int:
    """Counts the numbers that the factorised form holds for a pair: products, attention and quadratic forms.

    The fused kernels hold products and, in training, their gradients.
    """
    if fused:
        return 2 * (2 * _attention_weights(scorer, num_frames, num_words) + num_frames + 6)
    if scorer.config.pooling == "mean":
        num_frames = 1
    wide = scorer.config.clip.embed_dim if scorer.context_of == "text" else 0
    return 6 * _attention_weights(scorer, num_frames, num_words) + 8 * num_frames + 16 + wide


def _attention_weights(scorer: PairScorer, num_frames: int, num_words: int) -> int:
    """Returns K, the number of attention weights of an owner."""
    positions = {"video": num_frames, "text": num_words, "none": 0}[scorer.context_of]
    return positions * scorer.config.increment_heads


def block_sizes(
    scorer: PairScorer,
    num_texts: int,
    num_frames: int,
    num_words: int,
    dtype: torch.dtype,
    device: torch.device,
) -> BlockSizes:
    """Computes block sizes under ``config.memory_mb`` from the numbers that a pair and an owner take."""
    width, itemsize = scorer.config.clip.embed_dim, dtype.itemsize
    whole = Budget.of(scorer.config.memory_mb, device)
    budget = whole.total
    fused = scorer.takes_kernel(num_frames, dtype, device)
    pair_bytes = itemsize * count_pair_numbers(scorer, num_frames, num_words, fused=fused)
    pairs = min(whole.block(CACHED_BYTES), budget // 4) // pair_bytes
    owners = owners_at_once(scorer, num_frames, num_words, itemsize, budget)
    # A query embedding takes: itself, centred, and by head its query before and after the key map.
    queries = max(budget // 4 // (itemsize * width * (3 + 2 * scorer.config.increment_heads)), 1)
    if scorer.context_of == "text":
        texts = min(64, max(1, math.isqrt(pairs)), owners)
        # A multiple of a block's texts, so that no block has only a few texts.
        return BlockSizes(owners // texts * texts, queries, texts, round_down_to_vector_units(pairs // texts))
    # If there are few texts, a block has more videos.
    texts = max(min(TEXTS_PER_BLOCK.get(device.type, 1024), pairs, num_texts), 1)
    return BlockSizes(owners, queries, texts, max(pairs // texts, 1))


def owners_at_once(
    scorer: PairScorer, num_frames: int, num_words: int, itemsize: int, budget_bytes: int
) -> int:
    """Returns the number of contexts whose basis is computed together under a budget."""
    keys = _attention_weights(scorer, num_frames, num_words)
    # Each takes mapped contexts, their copies by head, basis and rows.
    owner_bytes = itemsize * scorer.config.clip.embed_dim * (12 * keys + 4 * num_frames + 8)
    return max(budget_bytes // 4 // owner_bytes, 1)


def round_down_to_vector_units(count: int) -> int:
    """Rounds a number of rows down to a multiple of 16 for vector units; smaller ones stay, from 1."""
    return count // 16 * 16 or max(count, 1)


def stream_scores(
    scorer: PairScorer,
    text: TextFeatures,
    video: VideoFeatures | PreparedVideo,
    method: str | None = None,
) -> Tensor:
    """Scores all pairs, (N, M) cosines, in blocks that keep to ``config.memory_mb``.

    Args:
        scorer: of the model.
        text: N encoded captions.
        video: M encoded clips, or the result of ``PairScorer.prepare_video``.
        method: as in ``PairScorer.path``.

    Raises:
        ConfigError: for an unknown method, or factorized for a model that has no factorised form.
    """
    if scorer.path(method) == "direct":
        features = video.features if isinstance(video, PreparedVideo) else video
        return stream_direct(scorer, text, features)
    return stream_factorized(scorer, text, video)


def stream_factorized(scorer: PairScorer, text: TextFeatures, video: VideoFeatures | PreparedVideo) -> Tensor:
    """Computes factorised scores (N, M), float32 at least; in one block if gradients are needed."""
    embedding = text.embedding
    with torch.autocast(embedding.device.type, enabled=False):
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        text = replace(text, embedding=embedding.to(dtype))  # words, which are large, block by block
        num_texts, num_videos = len(embedding), len(video)
        num_frames, num_words = video.mask.shape[1], text.mask.shape[1]
        sizes = block_sizes(scorer, num_texts, num_frames, num_words, dtype, embedding.device)
        if torch.is_grad_enabled():
            most = max(num_texts, num_videos, 1)
            sizes = BlockSizes(most, most, most, most)
        blocks = _by_texts if scorer.context_of == "text" else _by_videos
        scores = None
        for texts, videos, block in blocks(scorer, text, video, sizes, dtype):
            if block.shape == (num_texts, num_videos):
                return block
            if scores is None:
                scores = block.new_empty(num_texts, num_videos)
            scores[texts, videos] = block
    return embedding.new_empty(num_texts, num_videos) if scores is None else scores


Blocks = Iterator[tuple[slice, slice, Tensor]]


def _by_videos(
    scorer: PairScorer,
    text: TextFeatures,
    video: VideoFeatures | PreparedVideo,
    sizes: BlockSizes,
    dtype: torch.dtype,
) -> Blocks:
    lean = isinstance(video, PreparedVideo) and video.scales is not None
    maps = None if isinstance(video, PreparedVideo) else scorer.basis_maps()
    keep = scorer.draw_dropout(0 if isinstance(video, PreparedVideo) else len(video.mask))
    # Prepared videos have their basis already.
    at_once = len(video) if isinstance(video, PreparedVideo) else sizes.owners
    # Texts become queries once for all videos, as many at a time as fit.
    for group in slices(len(text.embedding), sizes.queries):
        texts = scorer.query_embeddings(text.embedding[group], lean=lean)
        for owners in slices(len(video), at_once):
            if isinstance(video, PreparedVideo):
                prepared = video[owners]
            else:
                prepared = scorer.with_basis(
                    video[owners].cast(dtype), maps, None if keep is None else keep[owners]
                )
            for columns in slices(len(prepared), sizes.videos):
                where = slice(owners.start + columns.start, owners.start + columns.stop)
                for rows in slices(len(texts), sizes.texts):
                    scores = scorer.pair_scores(prepared[columns], texts[rows])
                    yield slice(group.start + rows.start, group.start + rows.stop), where, scores.T


def _by_texts(
    scorer: PairScorer,
    text: TextFeatures,
    video: VideoFeatures | PreparedVideo,
    sizes: BlockSizes,
    dtype: torch.dtype,
) -> Blocks:
    maps = scorer.basis_maps()
    assert maps is not None
    keep = scorer.draw_dropout(len(text.embedding))
    # Prepared videos are mapped means beside views of the frames: computed once if they fit.
    if isinstance(video, VideoFeatures) and video.frames.dtype == dtype and len(video) <= sizes.queries:
        video = scorer.with_basis(video, maps, None)
    for owners in slices(len(text.embedding), sizes.owners):
        some_text = text[owners].cast(dtype)
        prepared = scorer.prepare_text(some_text, maps, None if keep is None else keep[owners])
        for columns in slices(len(video), sizes.videos):
            some = video[columns]
            if isinstance(some, VideoFeatures):
                some = scorer.with_basis(some.cast(dtype), maps, None)
            for rows in slices(len(some_text.embedding), sizes.texts):
                scores = scorer.pair_scores(prepared[rows], some)
                yield slice(owners.start + rows.start, owners.start + rows.stop), columns, scores


def stream_direct(scorer: PairScorer, text: TextFeatures, video: VideoFeatures) -> Tensor:
    """Computes scores (N, M) in the direct form; if no gradients are needed, in blocks within the budget."""
    dtype = torch.promote_types(text.embedding.dtype, torch.float32)
    with torch.autocast(text.device.type, enabled=False):
        return _direct(scorer, text.cast(dtype), video.cast(dtype))


def _direct(scorer: PairScorer, text: TextFeatures, video: VideoFeatures) -> Tensor:
    num_texts, num_videos = len(text.embedding), len(video.mask)
    owners = num_videos if scorer.context_of == "video" else num_texts
    keep = scorer.draw_dropout(owners)
    itemsize, width = text.embedding.element_size(), scorer.config.clip.embed_dim
    pairs = Budget.of(scorer.config.memory_mb, text.embedding.device).total // (
        DIRECT_VECTORS * itemsize * width
    )
    side = max(math.isqrt(pairs), 1)
    if torch.is_grad_enabled() or max(num_texts, num_videos) <= side:
        return scorer.pairs(text, video, keep).scores
    scores = text.embedding.new_empty(num_texts, num_videos)
    for rows in slices(num_texts, side):
        for columns in slices(num_videos, side):
            some = None if keep is None else keep[columns if scorer.context_of == "video" else rows]
            scores[rows, columns] = scorer.pairs(text[rows], video[columns], some).scores
    return scores
