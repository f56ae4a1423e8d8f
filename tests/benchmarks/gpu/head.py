"""The head by size and form: scores of all pairs, and steps from features to gradients.

The forms: the direct one, the factorised one by plain operations and by fused kernels, and variants with
prepared videos and with cheaper products. Steps are also measured as a CUDA graph of the fused form, and as
dot products without increments, which shows the cost of increments. Without kernels, fused forms are plain
ones.

N pairs, F frames, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from gare.config import ModelConfig
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.objective import StepRandomness, loss_terms, sharded_terms
from tests.benchmarks.gpu.bench import Bench, Row, if_memory_suffices, once, say, seconds_of
from tests.benchmarks.gpu.launches import graphed_step, operations_of


@dataclass(frozen=True)
class Form:
    """A method to compute scores of pairs.

    Attributes:
        name: name in tables.
        method: direct or factorized.
        kernel: value of ``model.kernel``.
        products: value of ``model.products``.
        prepared: True if videos are prepared beforehand.
        graph: True if a step is one CUDA graph.
        increments: False for the baseline of mean-pooled clips, one product and InfoNCE.
    """

    name: str
    method: Literal["direct", "factorized"] = "factorized"
    kernel: str = "auto"
    products: str = "exact"
    prepared: bool = False
    graph: bool = False
    increments: bool = True

    @property
    def most(self) -> int:
        """Largest number of pairs for which a step is measured."""
        return GRAPHED_PAIRS if self.graph else 2**31


#: Number of pairs above which a step's work takes longer than its launches.
GRAPHED_PAIRS = 512
DIRECT, PLAIN, FUSED = Form("direct", "direct"), Form("plain", kernel="plain"), Form("fused")
TF32 = Form("fused, tf32", products="tf32", prepared=True)
BF16 = Form("fused, bf16", products="bf16", prepared=True)
PREPARED = Form("fused, prepared", prepared=True)
SCORE_FORMS = (DIRECT, PLAIN, FUSED, PREPARED, TF32, BF16)
DOT = Form("dot products", increments=False)
STEP_FORMS = (DIRECT, PLAIN, FUSED, Form("fused, graph", graph=True), TF32, BF16, DOT)
SCORES, STEPS = (1000, 10_000), (128, 256, 512, 1024, 4096, 16_384)
#: Of these, those that are looked at more closely, by ``tiles`` and ``kernel_times``.
MANY_SCORES, FEW_STEPS = SCORES[-1], (128, 1024, 4096)
TINY_SCORES, TINY_STEPS = (8, 16), (4, 8)
#: Number of texts and videos whose scores are compared with float64.
COMPARED = 64


def measure(bench: Bench) -> Row:
    """Measures errors against float64, then operations, milliseconds and GB by size and form."""
    found: Row = {"relative_error": _errors(bench), "gradient_error": _gradient_errors(bench)}
    for what, key in (("scores", "relative_error"), ("gradients of frames", "gradient_error")):
        text = ", ".join(f"{form} {error:.2g}" for form, error in found[key].items())
        say(f"  {what} against float64: relative error {text}")
    found["operations"] = {
        form.name: operations_of(make_step(bench, TINY_STEPS[0], form))
        for form in STEP_FORMS
        if not form.graph
    }
    text = ", ".join(f"{form} {count}" for form, count in found["operations"].items())
    say(f"  operations of a step, forward and backward: {text}")
    few, many = (TINY_SCORES if bench.tiny else SCORES)[0], (TINY_SCORES if bench.tiny else SCORES)[1:]
    sizes = TINY_STEPS if bench.tiny else STEPS
    # The largest scores come last, since they take longest in the direct form.
    found["scores"] = _series(bench, "scores of", (few,), SCORE_FORMS, scores_of)
    found["steps"] = _series(bench, "step of", sizes, STEP_FORMS, make_step)
    found["scores"] += _series(bench, "scores of", many, SCORE_FORMS, scores_of, found["scores"])
    return found


def build_head(bench: Bench, config: ModelConfig) -> GARE:
    """Builds the model without towers, on the device."""
    torch.manual_seed(bench.seed)
    with bench.device:
        return GARE(config, towers=False)


def features(bench: Bench, size: int) -> tuple[TextFeatures, VideoFeatures]:
    """Draws features of as many captions as clips, without padding."""
    model, generator = bench.config.model, bench.generator()
    width, frames = model.clip.embed_dim, model.max_frames

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=bench.device, generator=generator)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bool, device=bench.device)

    text = TextFeatures(normal(size, width), None, ones(size, 1))
    return text, VideoFeatures(normal(size, frames, width), ones(size, frames))


def _errors(bench: Bench) -> dict[str, float]:
    size = 8 if bench.tiny else COMPARED
    text, video = features(bench, size)
    found = {form.name: scores_of(bench, size, form)().double() for form in SCORE_FORMS}
    model = build_head(bench, bench.config.model).eval()
    with torch.inference_mode():
        exact = model.double().score(
            TextFeatures(text.embedding.double(), None, text.mask),
            VideoFeatures(video.frames.double(), video.mask),
            "direct",
        )
    return {form: relative_error(scores, exact) for form, scores in found.items()}


def _gradient_errors(bench: Bench) -> dict[str, float]:
    """Returns errors of the frames' gradients, without the direct form, which has other dropout masks."""
    size = 8 if bench.tiny else COMPARED
    exact = frame_gradients(bench, size, PLAIN, torch.float64)
    found = {}
    for form in STEP_FORMS:
        if form.method == "factorized" and form.increments and not form.graph:
            found[form.name] = frame_gradients(bench, size, form, torch.float32)
    return {form: relative_error(one, exact) for form, one in found.items()}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns ‖found − exact‖ / ‖exact‖."""
    return float((found - exact).norm() / exact.norm())


def frame_gradients(bench: Bench, size: int, form: Form, dtype: torch.dtype) -> torch.Tensor:
    """Computes the gradient of a step's loss by the frames, (size, F, D) float64."""
    config = _configured(bench, form, increment_dropout_per="context")
    model = build_head(bench, config).train().to(dtype)
    text, video = features(bench, size)
    frames = video.frames.to(dtype).requires_grad_()
    text = TextFeatures(text.embedding.to(dtype), None, text.mask)
    loss = bench.config.loss
    draws = StepRandomness.of_step(model.scorer, loss, size, bench.seed)
    terms = sharded_terms(model, text, VideoFeatures(frames, video.mask), loss, draws)
    return torch.autograd.grad(terms.objective, frames)[0].double()


def _configured(bench: Bench, form: Form, **settings: object) -> ModelConfig:
    settings |= {"kernel": form.kernel, "products": form.products}
    if not form.increments:
        settings |= {"increment": False, "pooling": "mean"}
    return bench.config.model.model_copy(update=settings)


def scores_of(bench: Bench, size: int, form: Form) -> Callable[[], torch.Tensor]:
    """Returns a function that scores as many texts as videos with each other, (size, size)."""
    model = build_head(bench, _configured(bench, form)).eval()
    text, video = features(bench, size)
    with torch.inference_mode():
        videos = model.prepare_video(video) if form.prepared else video

    def score() -> torch.Tensor:
        with torch.inference_mode():
            return model.score(text, videos, form.method)

    return score


def make_step(bench: Bench, size: int, form: Form) -> Callable[[], object]:
    """Returns a training step of the head with the losses of the configuration.

    The direct form has its own dropout for each pair, as in the paper. In both forms, the configuration says
    for this size which texts the diversity is computed over.
    """
    per = "pair" if form is DIRECT else "context"
    config = _configured(bench, form, increment_dropout_per=per)
    model, loss = build_head(bench, config).train(), bench.config.loss
    text, video = features(bench, size)
    text = TextFeatures(text.embedding.requires_grad_(), None, text.mask)
    video = VideoFeatures(video.frames.requires_grad_(), video.mask)
    if form.graph:
        draws = StepRandomness.of_step(model.scorer, loss, size, bench.seed)
        return graphed_step(model, text, video, loss, draws)
    compute = loss_terms if form is DIRECT else sharded_terms

    def step() -> None:
        draws = StepRandomness.of_step(model.scorer, loss, size, bench.seed)
        compute(model, text, video, loss, draws).objective.backward()

    return step


@dataclass(frozen=True)
class Before:
    """Cost of the previous size, to predict that of the next one: both grow with N² at most."""

    size: int
    seconds: float
    peak_bytes: float

    def reason_against(self, bench: Bench, size: int, form: str) -> str:
        """Returns the reason not to try a size, or an empty text."""
        growth = (size / self.size) ** 2
        if growth * self.seconds > bench.left_s():
            return (
                f"it might take {growth * self.seconds:.0f} s, and the part has {bench.left_s():.0f} s left"
            )
        # Blocks limit the memory of the factorised form and of scores; only the direct step surely grows so.
        if form == "direct step" and growth * self.peak_bytes > bench.memory_bytes():
            return f"it needs about {growth * self.peak_bytes / 1e9:.0f} GB"
        return ""


def _series(
    bench: Bench,
    what: str,
    sizes: tuple[int, ...],
    forms: tuple[Form, ...],
    make: Callable[[Bench, int, Form], Callable[[], object]],
    earlier: list[Row] | None = None,
) -> list[Row]:
    """Measures one row for each size and form, in the order of the sizes."""
    before: dict[str, Before] = {
        row["form"]: Before(row["size"], row["ms"] / 1e3, row["peak_gb"] * 1e9)
        for row in earlier or ()
        if "ms" in row
    }
    rows: list[Row] = []
    for size in sizes:
        for form in forms:
            name = form.name
            row: Row = {"size": size, "form": name}
            kind = f"{name} step" if make is make_step else name
            reason = before[name].reason_against(bench, size, kind) if name in before else ""
            if size > form.most:
                reason = f"it is measured up to {form.most} pairs"
            if form.graph and not bench.is_gpu:
                reason = "CUDA graphs are a GPU's"
            if not reason and not bench.left_s():
                reason = "the part has no time left"
            if not reason:
                bench.reset_peak()
                found = if_memory_suffices(
                    bench,
                    lambda size=size, form=form, name=name: _timed(
                        bench, make(bench, size, form), is_first=name not in before
                    ),
                )
                reason = "" if found else "it needs more memory than the device has"
                row |= found or {}
            if reason:
                row["left_out"] = reason
            else:
                before[name] = Before(size, row["ms"] / 1e3, row["peak_gb"] * 1e9)
            rows.append(row)
            measured = (
                f"{row['ms']:.4g} ms, {row['peak_gb']:.3g} GB" if "ms" in row else f"left out: {reason}"
            )
            say(f"  {what} {size:>6,} {name:<15} {measured}")
    return rows


def _timed(bench: Bench, call: Callable[[], object], *, is_first: bool) -> dict[str, float]:
    if is_first:
        once(bench, call)  # loads kernels, so its time does not predict the next size
    timing = seconds_of(bench, call, budget_s=min(2.0, bench.left_s() / 8), most=20)
    return {"ms": timing.seconds * 1e3, "runs": timing.runs, "peak_gb": bench.peak_gb()}
