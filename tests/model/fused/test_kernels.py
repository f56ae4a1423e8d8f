"""The fused kernels give the plain form's numbers and gradients, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gare.config import LossConfig
from gare.errors import ConfigError
from gare.model.budget import Budget
from gare.model.factorized.prepared import Embeddings, PreparedVideo
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.fused import blocks as fused
from gare.model.fused.blocks import FusedPairs, FusedRequest, fused_pairs, merge_moments
from gare.model.fused.tile_sizes import SHARED_BYTES
from gare.model.gare import GARE
from gare.train.loss import blocks
from gare.train.loss.blocks import BlockRequest, compute_block
from gare.train.loss.gather import gather
from gare.train.loss.objective import StepRandomness, sharded_terms
from tests.helpers import parity
from tests.helpers.heads import clip_like, features, head

pytestmark = [
    pytest.mark.kernels,
    # Triton reads it as the kernels are imported; set here, other tests and processes would have it too.
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="make test-kernels runs these"),
]

WIDTH = 32


def sides(model: GARE, text: TextFeatures, video: VideoFeatures) -> tuple[Embeddings, PreparedVideo]:
    scorer = model.scorer
    return scorer.query_embeddings(text.embedding), scorer.with_basis(video, scorer.basis_maps(), None)


def plain(
    model: GARE, texts: Embeddings, video: PreparedVideo, asked: FusedRequest, sample: Tensor | None
) -> FusedPairs:
    """The same by the definition."""
    wanted = BlockRequest(
        asked.moments, False, asked.normalised, (asked.sample is not None, sample), asked.plain
    )
    block = compute_block(model.scorer, "video", video, texts, wanted, sample, None)
    mean, scatter = block.moments or (None, None)
    return FusedPairs(block.scores, block.norms, block.plain, block.sampled, mean, scatter)


def gradients(found: FusedPairs, factors: FusedPairs, leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum of all that was found, each number with a factor of its own."""
    total = sum(
        (value * factor).sum()
        for name, value, factor in zip(FusedPairs._fields, found, factors, strict=True)
        if value is not None and factor is not None and name != "plain"
    )
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def compare(
    model: GARE, text: TextFeatures, video: VideoFeatures, asked: FusedRequest, *, tolerance: float
) -> None:
    """Holds values and gradients against the plain form in float64."""
    sample = asked.sample if isinstance(asked.sample, Tensor) else None
    exact = GARE(model.config).double()
    exact.load_state_dict(model.state_dict())
    outcomes = []
    factors: FusedPairs | None = None
    for one, is_fused in ((exact.eval(), False), (model, True)):
        kind = next(one.parameters()).dtype
        embedding = text.embedding.to(kind).requires_grad_()
        frames = video.frames.to(kind).requires_grad_()
        owners = sides(one, replace(text, embedding=embedding), VideoFeatures(frames, video.mask))
        found = (
            fused_pairs(one.scorer.rule, *owners, asked) if is_fused else plain(one, *owners, asked, sample)
        )
        if factors is None:
            factors = FusedPairs(*(None if value is None else torch.randn_like(value) for value in found))
        leaves = [embedding, frames, *one.increment.parameters()]  # type: ignore[union-attr]
        scaled = FusedPairs(*(None if factor is None else factor.to(kind) for factor in factors))
        outcomes.append((found, gradients(found, scaled, leaves)))
    (expected, expected_grads), (found, grads) = outcomes
    for name, value, right in zip(FusedPairs._fields, found, expected, strict=True):
        if asked.norms or name != "norms":
            assert (value is None) == (right is None), name
        if value is not None and right is not None:
            worst = float(((value - right).abs().max() / right.abs().max().clamp(min=1)).detach())
            assert worst < tolerance / 10, f"{name}: {worst:g}"
    whole = torch.cat([grad.flatten() for grad in expected_grads if grad is not None]).norm()
    for number, (grad, right) in enumerate(zip(grads, expected_grads, strict=True)):
        assert (grad is None) == (right is None), number
        if grad is not None and right is not None:
            # Some are differences of nearly equal numbers, and vanish beside the others.
            worst = float((grad - right).norm() / torch.maximum(right.norm(), 1e-3 * whole))
            assert worst < tolerance, f"gradient {number}: {worst:g}"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    side=st.sampled_from(["text", "video"]),
    sign=st.sampled_from([1, -1]),
    heads=st.sampled_from([1, 2, 4]),
    num_frames=st.sampled_from([1, 2, 3, 5]),
    num_texts=st.integers(1, 9),
    num_videos=st.integers(1, 5),
    normalised=st.booleans(),
    sampled=st.sampled_from(["none", "all", "some"]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_plain_form(
    side: str,
    sign: int,
    heads: int,
    num_frames: int,
    num_texts: int,
    num_videos: int,
    normalised: bool,
    sampled: str,
    seed: int,
) -> None:
    """On a GPU training would otherwise learn something else than on a CPU, and nobody would see it."""
    torch.manual_seed(seed)
    model = head(WIDTH, corrected_side=side, gap_sign=sign, increment_heads=heads)
    text, video = features(num_texts, num_videos, num_frames, 3, WIDTH, torch.float64)
    some: Any = {"none": None, "all": "all", "some": torch.arange(0, num_texts, 2)}[sampled]
    asked = FusedRequest(norms=True, plain=True, sample=some, moments=True, normalised=normalised)
    compare(model, text, video, asked, tolerance=1e-8)


@pytest.mark.parametrize(("num_frames", "heads"), [(12, 1), (16, 1), (17, 1), (12, 4), (64, 1)])
@pytest.mark.parametrize("side", ["text", "video"])
def test_tiles_of_every_size(num_frames: int, heads: int, side: str, seed: int) -> None:
    """Clips of the paper's benchmarks have 12 and 64 frames; a tile that is cut off would lose some."""
    torch.manual_seed(seed)
    model = head(WIDTH, corrected_side=side, increment_heads=heads)
    text, video = features(70, 2, num_frames, 3, WIDTH, torch.float64)
    asked = FusedRequest(norms=True, sample=torch.tensor([3, 69]), moments=True)
    compare(model, text, video, asked, tolerance=1e-8)


@pytest.mark.parametrize("num_frames", [1, 12])
def test_parts_of_the_texts_make_the_whole(
    num_frames: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A GPU has many programs for a video, each with a share of the texts; here each takes one block."""
    torch.manual_seed(seed)
    model = head(WIDTH)
    text, video = features(97, 2, num_frames, 3, WIDTH, torch.float64)
    asked = FusedRequest(norms=True, sample=torch.tensor([3, 96]), moments=True, normalised=True)
    monkeypatch.setattr(fused._Shape, "texts_per_program", lambda shape, device: 32)
    compare(model, text, video, asked, tolerance=1e-8)
    with torch.no_grad():
        scatter = fused_pairs(model.scorer.rule, *sides(model, text, video), asked).scatter
    assert scatter is not None
    # Increments of a clip with one frame are equal, and no rounding may pass for their spread.
    assert bool((scatter[video.mask.sum(dim=1) == 1] == 0).all())


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_stays_so(seed: int) -> None:
    """A NaN that became a score of −1 would be ranked and learned from, and nobody would be told."""
    torch.manual_seed(seed)
    model = head(WIDTH, kernel="triton")
    text, video = features(4, 3, 5, 3, WIDTH, torch.float64)
    embedding = text.embedding.clone()
    embedding[2, 0] = torch.nan
    with torch.no_grad():
        scores = model.score(replace(text, embedding=embedding), video)
    assert scores[2].isnan().all()
    assert scores[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("side", ["text", "video"])
def test_float32_keeps_the_promise(side: str, seed: int) -> None:
    """Scores to 1e-5 of float64's and gradients to 1e-4 are what "exact" means, on features like CLIP's."""
    torch.manual_seed(seed)
    model = head(WIDTH, corrected_side=side, spread=0.0, dtype=torch.float32)
    text, video = clip_like(33, 12, 3, WIDTH)
    asked = FusedRequest(norms=True, sample=torch.tensor([0, 32]), moments=True)
    compare(model, text, video, asked, tolerance=1e-4)


def test_extreme_logits_and_equal_frames(seed: int) -> None:
    """A softmax that is all at one frame, or even to the last bit, must not make NaN."""
    torch.manual_seed(seed)
    model = head(WIDTH, spread=3.0)
    text, video = features(5, 4, 6, 3, WIDTH, torch.float64)
    frames = video.frames.clone()
    frames[1] = frames[1, :1]
    frames[2] *= 1e4
    video = VideoFeatures(frames, torch.ones_like(video.mask))
    asked = FusedRequest(norms=True, sample="all", moments=True)
    compare(model, text, video, asked, tolerance=1e-6)


def test_moments_of_parts_make_those_of_the_whole(seed: int) -> None:
    """The bottleneck's σ comes from parts of the texts; raw second moments would be off by percents."""
    torch.manual_seed(seed)
    values = 100 + torch.randn(3, 9, 4, dtype=torch.float64)
    parts = values.split([2, 3, 4], dim=1)
    means = torch.stack([part.mean(dim=1) for part in parts])
    scatters = torch.stack([(part - part.mean(1, True)).mT @ (part - part.mean(1, True)) for part in parts])
    mean, scatter = merge_moments(means, scatters, torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))
    apart = values - values.mean(1, True)
    torch.testing.assert_close(mean, values.mean(1))
    torch.testing.assert_close(scatter, apart.mT @ apart)


@pytest.mark.parametrize("side", ["text", "video"])
def test_scores_of_a_model_are_those_of_the_plain_form(side: str, seed: int) -> None:
    """Search and evaluation on a GPU take this path, in blocks of whatever size its memory gives."""
    torch.manual_seed(seed)
    text, video = features(70, 9, 5, 3, WIDTH, torch.float64)
    plain_model = head(WIDTH, kernel="plain", corrected_side=side)
    right = plain_model.score(text, video)
    for memory_mb in ("auto", 1):
        model = head(WIDTH, kernel="triton", corrected_side=side, memory_mb=memory_mb)
        model.load_state_dict(plain_model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model.score(text, video), right, rtol=0, atol=1e-10)
            prepared = model.prepare_video(video)
            torch.testing.assert_close(model.score(text, prepared), right, rtol=0, atol=1e-10)
        torch.testing.assert_close(model.score(text, video), right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 2])
def test_lean_videos_are_scored_as_those_with_a_basis(heads: int, seed: int) -> None:
    """A gallery that was prepared without the kernels must rank alike where they are to be had."""
    torch.manual_seed(seed)
    model = head(WIDTH, increment_heads=heads)
    text, video = features(70, 4, 5, 3, WIDTH, torch.float64)
    with torch.no_grad():
        lean = model.prepare_video(video, lean=True)
        right = model.scorer.pair_numbers(*reversed(sides(model, text, video))).scores
        asking = model.scorer.query_embeddings(text.embedding, lean=True)
        for some in (slice(0, 7), slice(0, 70)):
            found = fused_pairs(model.scorer.rule, asking[some], lean, FusedRequest())
            torch.testing.assert_close(found.scores, right[:, some], rtol=0, atol=1e-10)


LOSSES: list[dict[str, Any]] = [
    {},
    {"kl_normalised": True, "direction_over": "sample", "direction_texts": 3},
    {"positives": "video", "direction_form": "orthogonality"},
    {"bottleneck_weight": 0.0, "direction_weight": 0.0},
    {"bottleneck_anchor": "text"},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: " ".join(map(str, loss)) or "default")
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_of_a_step(
    loss: dict[str, Any], recompute: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Every term of a step must be the same on a GPU, also where its blocks are computed again."""
    torch.manual_seed(seed)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4000)  # several blocks
    recomputed = []

    def counted(*arguments: Any, **options: Any) -> Any:
        recomputed.append(arguments[0].__name__)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(blocks, "checkpoint", counted)
    if recompute:
        monkeypatch.setattr(Budget, "of", classmethod(lambda cls, _, device: cls(8000, device)))
    text, video = features(9, 9, 4, 3, WIDTH, torch.float64)
    video_ids = torch.arange(9) // 2
    outcomes = []
    weights = head(WIDTH).state_dict()
    for kernel in ("plain", "auto" if loss.get("bottleneck_anchor") else "triton"):
        model = head(WIDTH, kernel=kernel, increment_dropout=0.3)
        model.load_state_dict(weights)
        model.train()
        config = LossConfig(**loss)
        draws = StepRandomness.of_step(model.scorer, config, 9, seed)
        terms = sharded_terms(model, text, video, config, draws, video_ids, watched=True)
        assert terms.seen is not None
        terms.objective.backward()
        grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        outcomes.append((terms.named(), grads, terms.seen.columns, terms.seen.plain_columns))
    assert bool(recomputed) == recompute
    assert ("compute_fused_block" in recomputed) == (recompute and not loss.get("bottleneck_anchor"))
    for found, right in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-10)


WORKERS = (
    "loss.direction_over=sample loss.direction_texts=3",
    "train.micro_batch=1 loss.positives=video",
    "train.batch_size=7 loss.kl_normalised=true",
)


def test_two_workers_are_one(repository: Path, tmp_path: Path, seed: int) -> None:
    """Shares of the texts on GPUs must give one gradient, also by GradCache and with unequal shares."""
    options = [f"model.kernel=triton {option}" for option in WORKERS]
    commands = [
        [sys.executable, "-m", "tests.helpers.parity", str(rank), str(seed), str(tmp_path), *options]
        for rank in range(2)
    ]
    parity.run_together(commands, tmp_path, 300, cwd=repository)
    for option in options:
        one = parity.run(seed, torch.float64, gather, *option.replace("triton", "plain").split())
        whole = torch.cat([value.flatten() for value in one.gradients.values()]).norm()
        for rank in range(2):
            found = torch.load(tmp_path / f"found-{rank}.pt", weights_only=True)[option]
            for name, value in one.terms.items():
                torch.testing.assert_close(found["terms"][name], value, rtol=1e-8, atol=1e-10, msg=name)
            for name, value in one.gradients.items():
                difference = (found["gradients"][name] - value).norm()
                bound = 1e-7 if "kl_normalised" in option else 1e-8  # whose terms cancel
                assert difference < bound * torch.maximum(value.norm(), 1e-3 * whole), f"{option}: {name}"


def test_the_path_is_chosen_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Who waits for a slow step must be told which path it takes, and who asks for one must get it."""
    text, video = features(3, 2, 4, 3, WIDTH, torch.float64)
    caplog.set_level(logging.INFO)
    with torch.no_grad():
        head(WIDTH).score(text, video)
        assert not caplog.messages  # on a CPU there is nothing to choose
        model = head(WIDTH, kernel="triton")
        model.score(text, video)
        model.score(text, video)
    assert caplog.messages == ["pairs on cpu are computed by fused Triton kernels"]
    for variant, reason in (
        ({"context": "words"}, "context words has no kernel"),
        ({"query": "text"}, "query text has no kernel"),
        ({"increment": False}, "a model without increments has no kernel"),
        ({"increment_heads": 32}, "frames times heads are 128, and the kernel holds 64"),
    ):
        with pytest.raises(ConfigError, match=reason), torch.no_grad():
            head(WIDTH, kernel="triton", **variant).score(text, video)


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gare.model.fused import kernels
from gare.model.factorized.pairs import ScoringRule
from gare.model.fused.blocks import FusedRequest, constants_of
for num_frames, heads in ((12, 1), (32, 1), (64, 1)):
    for kernel in (kernels.forward, kernels.backward):
        asked = FusedRequest(norms=True, plain=True, sample="all", moments=True)
        rule = ScoringRule("text", 3.0, None)
        constants = constants_of(rule, asked, 512, num_frames, heads, torch.float32, True)
        warps = constants.pop("num_warps")
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        constants |= {"HAS_PLAIN": True} if "HAS_PLAIN" in kernel.arg_names else {}
        numbers = ("N", "S", "num_videos", "texts_per_program")
        kinds = {name: "i32" if name in numbers else "*fp32" for name in kernel.arg_names}
        kinds |= {"slots": "*i32"} | dict.fromkeys(constants, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature=kinds, constexprs=places)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        print(num_frames, heads, compiled.metadata.shared)
"""


def test_kernels_compile_for_a_gpu(repository: Path, tmp_path: Path) -> None:
    """Code that the interpreter takes need not be code that the compiler does, nor fit a multiprocessor."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    for line in done.stdout.splitlines():
        num_frames, _, shared = map(int, line.split())
        assert shared <= SHARED_BYTES[16 if num_frames == 12 else num_frames], line
