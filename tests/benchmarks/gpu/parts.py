"""Parts of the benchmark: what each one measures, what it needs, and its share of the time.

Importing this module is light: ``--help`` needs it on a machine that lacks everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

#: Packages that the configuration needs.
CONFIGURATION = ("pydantic", "yaml")


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        name: name for ``--parts``, and key in the JSON.
        about: one line for ``--help``.
        share: proportion of the time; unused time goes to the following parts.
        module: module of this package with ``measure(bench)``, which returns the part's JSON.
        needs: packages, besides torch, without which the part is skipped.
        partly: packages without which some of the part is left out.
        on_request: True if the part is measured only when it is named.
    """

    name: str
    about: str
    share: float
    module: str
    needs: tuple[str, ...]
    partly: tuple[str, ...] = ()
    on_request: bool = False

    @property
    def needs_configuration(self) -> bool:
        """True if the part reads conf/msrvtt.yaml."""
        return set(CONFIGURATION) <= set(self.needs)


PARTS = (
    Part(
        "ceilings",
        "matrix products in bf16, TF32 and float32 (TFLOP/s); copies on the device and to it (GB/s)",
        10,
        "ceilings",
        (),
    ),
    Part(
        "transfer",
        "a batch of frames to the device: uint8 from pinned memory, normalised there, against float32 from "
        "pageable memory (ms a clip)",
        10,
        "transfer",
        ("numpy", "PIL"),
    ),
    Part(
        "feed",
        "loaded batches on their way to the device: the thread that copies, that of the step, augmentation "
        "(ms a clip)",
        10,
        "feed",
        (*CONFIGURATION, "numpy", "PIL", "pyarrow", "safetensors"),
    ),
    Part(
        "step",
        "a training step of conf/msrvtt.yaml by stage, baseline and GARE, by precision: pairs/s, TFLOP/s, "
        "GB; before and after compiling, by optimiser, with activation checkpointing (ratios, cold start)",
        110,
        "step",
        (*CONFIGURATION, "numpy", "transformers"),
    ),
    Part(
        "encode",
        "frames/s of the image tower in inference, by precision, and compiled with weights cast once",
        25,
        "encode",
        (*CONFIGURATION, "numpy", "transformers"),
    ),
    Part(
        "head",
        "scores and training steps of the head by size, direct, factorised and by fused kernels (ms, GB)",
        55,
        "head",
        (*CONFIGURATION, "numpy"),
    ),
    Part(
        "evaluation",
        "ranks of 10,000 texts × 10,000 videos in both directions, with 95 % intervals (s, GB)",
        10,
        "evaluation",
        (*CONFIGURATION, "numpy"),
    ),
    Part(
        "loader",
        "clips/s of the loader from generated JPEG clips, one process and one for each CPU, with and without "
        "augmentation",
        30,
        "loader",
        (*CONFIGURATION, "numpy", "PIL", "pyarrow", "simplejpeg"),
        ("cv2",),
    ),
    Part(
        "training",
        "steps of pipelines/train.py on generated clips: time a step against the part step, data wait",
        70,
        "training",
        (
            *(*CONFIGURATION, "numpy", "PIL", "pyarrow", "simplejpeg", "transformers", "safetensors"),
            *("ftfy", "instant_clip_tokenizer", "cv2", "matplotlib", "psutil", "mlflow", "ray"),
        ),
    ),
    Part(
        "tiles",
        "scores and steps of the head by the tile size of the fused kernels, with their errors (ms)",
        60,
        "tiles",
        (*CONFIGURATION, "numpy"),
        on_request=True,
    ),
    Part(
        "kernels",
        "scores and steps of the head, by kernel: the device's and the host's time (ms)",
        20,
        "kernel_times",
        (*CONFIGURATION, "numpy"),
        on_request=True,
    ),
)


def is_there(package: str) -> bool:
    """Returns True if the package can be found; does not import it."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def missing_packages(parts: Sequence[Part]) -> dict[str, list[str]]:
    """Returns the missing packages, each with the parts that need it fully or partly."""
    missing: dict[str, list[str]] = {}
    for part in parts:
        for package in (*part.needs, *part.partly):
            if not is_there(package):
                cost = part.name if package in part.needs else f"{part.name} (some of it)"
                missing.setdefault(package, []).append(cost)
    return missing


def lacking(part: Part, missing: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the missing packages because of which a part is skipped."""
    return [package for package in part.needs if package in missing]
