"""Cost model of a training step on 8 to 512 GPUs: bytes sent and seconds; computed, not measured.

The bytes are those of the program: ``tests/train/test_stages.py`` counts them in a real step. The seconds
come from measured parts of a step and published speeds; ``ASSUMPTIONS`` lists the assumptions.

R GPUs, b pairs on each, N = R·b pairs of the global batch, F frames, W words, D width, L = F·H + 3 numbers
per increment of the video's basis, P trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Form = Literal["sharded", "everything", "everything and words"]
FLOAT = 4
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a training step."""

    pairs_per_gpu: int = 32
    frames: int = 12
    words: int = 32
    width: int = 512
    heads: int = 1
    #: Parameters of CLIP ViT-B/32, the temporal transformer and ψ.
    parameters: int = 165_000_000


@dataclass(frozen=True)
class Parts:
    """Measured seconds of the parts of a step on one device.

    Attributes:
        towers_s: forward and backward for the clip and caption of one pair.
        head_s: forward and backward of scores and losses for one text and one video.
        optimizer_s: one optimiser step.
    """

    towers_s: float
    head_s: float
    optimizer_s: float

    def on_gpu(self, matmul_flops: float) -> Parts:
        """Scales these parts from a CPU with this speed of matrix products to a GPU."""
        return Parts(
            self.towers_s * matmul_flops / (H100_BF16_FLOPS * TOWERS_SHARE),
            self.head_s * matmul_flops / (H100_FP32_FLOPS * HEAD_SHARE),
            OPTIMIZER_BYTES * 165e6 / H100_MEMORY_BYTES_PER_S,
        )


#: Published speeds: H100 SXM, dense; its memory, bytes/s; NVLink 4 in one direction.
H100_BF16_FLOPS, H100_FP32_FLOPS = 989e12, 67e12
H100_MEMORY_BYTES_PER_S, NVLINK_BYTES_PER_S = 3.35e12, 450e9
#: Published speeds of a node's links in one direction.
NETWORKS = {"400 Gb/s InfiniBand": 50e9, "100 Gb/s Ethernet": 12.5e9}
#: Assumed shares of the published speeds.
TOWERS_SHARE, HEAD_SHARE, LINK_SHARE = 0.4, 0.25, 0.8
LATENCY_S = 10e-6
#: Bytes that AdamW moves per parameter: reads weight, gradient and two moments, writes three of them.
OPTIMIZER_BYTES = 28
#: Share of the backward during which gradients are sent.
HIDDEN_SHARE = 0.8

ASSUMPTIONS = f"""
- Weak scaling: {Shape().pairs_per_gpu} pairs on each GPU (the paper's 128 on 4), ViT-B/32, F = 12, D =
  512, features in float32. The global batch, and with it every text's negatives, grows with the GPUs.
  Data is always there in time.
- Step parts are measured on one thread of this machine and divided by the ratio of speeds, in proportion
  to what that thread reaches in a matrix product: towers run at {TOWERS_SHARE:.0%} of an H100's 989
  TFLOP/s in bf16, scores and losses at {HEAD_SHARE:.0%} of its 67 TFLOP/s in float32. `--profile` takes
  the parts of a real run on GPUs instead.
- Rings: an all-gather of T bytes sends (R−1)/R·T from each GPU, an all-reduce twice that. 8 GPUs a node
  by NVLink (450 GB/s each way); between nodes each ring crosses a node's link once. All links at
  {LINK_SHARE:.0%}; {LATENCY_S * 1e6:.0f} µs for each of 2·log2(R) hops of a collective.
- The gather's backward is an all-reduce, as in the program (a reduce-scatter would be half of its bytes).
- Gradients ({Shape().parameters / 1e6:.0f} M parameters, float32) travel beside {HIDDEN_SHARE:.0%} of the
  backward of the towers; nothing else overlaps.
""".strip()


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step: total bytes gathered or reduced, and number of calls."""

    gathered: int
    reduced: int
    calls: int

    def sent_bytes(self, gpus: int) -> float:
        """Returns the bytes that each GPU sends."""
        return (gpus - 1) / gpus * (self.gathered + 2 * self.reduced)


def loss_traffic(form: Form, num_pairs: int, shape: Shape) -> Traffic:
    """Returns the traffic of the loss: forward and backward of the gather, and values that rows share.

    Args:
        form: sharded: each worker computes its own rows, as in ``gare.train.loss.sharded``; everything: every
            worker has all captions and clips and computes the whole loss; with or without words.
        num_pairs: N.
        shape: sizes of the step.
    """
    frames = num_pairs * shape.frames * shape.width * FLOAT
    masks = num_pairs * shape.frames
    equal_rows = 16
    if form == "sharded":
        vectors = shape.frames * shape.heads + 3
        columns = 3 * num_pairs * FLOAT  # the maxima and the sums, forward; one more, backward
        moments = 2 * num_pairs * (vectors + vectors**2) * FLOAT
        scalars = (2 + 6) * FLOAT  # the radii, forward and backward; six terms for the log
        ends = 2 * shape.width * FLOAT  # of the texts, to see if all are equal
        shared = columns + moments + scalars + ends
        return Traffic(frames + masks, frames + shared + equal_rows, 15)
    texts = num_pairs * shape.width * FLOAT * (1 + (shape.words if form.endswith("words") else 0))
    return Traffic(
        frames + texts + masks + num_pairs * shape.words,
        frames + texts + equal_rows,
        7 + 2 * form.endswith("words"),
    )


def seconds_of(traffic: Traffic, gpus: int, network_bytes_per_s: float) -> float:
    """Returns the seconds of collectives that do not overlap with computation."""
    link = NVLINK_BYTES_PER_S if gpus <= GPUS_PER_NODE else min(NVLINK_BYTES_PER_S, network_bytes_per_s)
    return traffic.sent_bytes(gpus) / (link * LINK_SHARE) + traffic.calls * 2 * math.log2(gpus) * LATENCY_S


@dataclass(frozen=True)
class Step:
    """Modelled times of a step, in seconds."""

    towers: float
    head: float
    loss_traffic: float
    gradients: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """Total seconds."""
        return self.towers + self.head + self.loss_traffic + self.gradients + self.optimizer


def step_of(form: Form, gpus: int, network_bytes_per_s: float, parts: Parts, shape: Shape) -> Step:
    """Models a step on a number of GPUs; ``parts`` are measured on, or scaled to, one GPU."""
    num_pairs = gpus * shape.pairs_per_gpu
    towers = parts.towers_s * shape.pairs_per_gpu
    rows = shape.pairs_per_gpu if form == "sharded" else num_pairs
    gradients = Traffic(0, shape.parameters * FLOAT, 20)
    exposed = seconds_of(gradients, gpus, network_bytes_per_s) - HIDDEN_SHARE * towers * 2 / 3
    return Step(
        towers,
        parts.head_s * rows * num_pairs,
        seconds_of(loss_traffic(form, num_pairs, shape), gpus, network_bytes_per_s),
        max(exposed, 0.0),
        parts.optimizer_s,
    )


def table(parts: Parts, shape: Shape, all_gpus: Iterable[int] = (8, 16, 32, 64, 128, 256, 512)) -> str:
    """Formats the model as a Markdown table; ``parts`` are measured on, or scaled to, one GPU."""
    lines = [
        "| GPUs | batch | MB sent by a GPU for the loss: sharded / everything / with words | for gradients "
        "| pairs scored by a GPU: sharded / everything | step, InfiniBand: sharded / everything "
        "| pairs/s, efficiency: InfiniBand | Ethernet |",
        "| ---: | ---: | --- | ---: | --- | --- | --- | --- |",
    ]
    infiniband, ethernet = NETWORKS.values()
    first: dict[float, float] = {}
    for gpus in all_gpus:
        batch = gpus * shape.pairs_per_gpu
        forms: tuple[Form, ...] = ("sharded", "everything", "everything and words")
        sent = " / ".join(f"{loss_traffic(form, batch, shape).sent_bytes(gpus) / 1e6:,.0f}" for form in forms)
        gradients = Traffic(0, shape.parameters * FLOAT, 1).sent_bytes(gpus) / 1e6
        steps = [step_of(form, gpus, infiniband, parts, shape).seconds for form in forms[:2]]
        rates = []
        for network in (infiniband, ethernet):
            rate = batch / step_of("sharded", gpus, network, parts, shape).seconds
            best = first.setdefault(network, rate / gpus)
            rates.append(f"{rate:,.0f}, {rate / gpus / best:.0%}")
        scored = f"{shape.pairs_per_gpu * batch:,} / {batch**2:,}"
        lines.append(
            f"| {gpus} | {batch:,} | {sent} | {gradients:,.0f} | {scored} "
            f"| {_time(steps[0])} / {_time(steps[1])} | {rates[0]} | {rates[1]} |"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
