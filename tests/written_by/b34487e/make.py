"""Makes root.tar.xz: what commit b34487e writes, and what a kill leaves of it. Run with that commit's code.

    git worktree add --detach OLD b34487e
    PYTHONPATH=OLD python tests/written_by/b34487e/make.py OLD

The outputs are made below /data/gare, which must not exist, and stay there to be looked at.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from gare.train.state import CONFIG, write_model

from cluster.tracking.outbox import add
from gare.config import parse_config
from gare.model.gare import GARE

ROOT = Path("/data/gare")
SETTINGS: dict[str, Any] = {
    "name": "whole",
    "storage": {"root": str(ROOT)},
    "data": {"benchmark": "synthetic", "num_train": 12, "num_val": 4, "num_test": 4},
    "extract": {
        "sample_fps": 2.0,
        "num_frames": 2,
        "image_size": 32,
        "encoding": "raw",
        "videos_per_part": 4,
        "workers": 1,
    },
    "features": {"weights": str(ROOT / "weights"), "videos_per_part": 4, "workers": 1},
    "model": {
        "clip": {
            "image_size": 32,
            "patch_size": 16,
            "vision_width": 16,
            "vision_layers": 1,
            "vision_heads": 2,
            "text_width": 16,
            "text_layers": 1,
            "text_heads": 2,
            "embed_dim": 16,
        },
        "max_words": 24,
        "max_frames": 2,
        "temporal_layers": 1,
        "temporal_heads": 2,
    },
    "train": {
        "run": "first",
        "clip_weights": str(ROOT / "weights"),
        "epochs": 2,
        "batch_size": 4,
        "captions_per_video": 1,
        "keep_checkpoints": 2,
        "clip_lr": 1e-3,
        "lr": 1e-3,
    },
    "cluster": {"num_cpus": 2, "train_workers": 1, "cpus_per_worker": 0.5},
    "tracking": {"system_metrics": False},
}
#: Seconds since 1970 of the videos' last change, which stores compare.
CHANGED_S = 1_700_000_000


def main() -> None:
    old, here = Path(sys.argv[1]).absolute(), Path(__file__).absolute().parent
    ROOT.mkdir(parents=True)
    (ROOT / "gare.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    write_weights()
    for name in ("whole", "half"):
        run(old, "prepare", f"name={name}")
        spoil_one_and_set_times(ROOT / name / "videos")
    run(old, "extract", "extract.store=both")
    run(old, "train")
    run(old, "evaluate")
    run(old, "train", "train.run=from-features", "train.input=features", "model.adapters=true")

    store, features = ROOT / "half/frames", ROOT / "half/features"
    for folder, overrides in (
        (store, ("extract.store=frames", "extract.videos_per_part=2")),
        (features, ("extract.store=features", "features.videos_per_part=2")),
    ):
        run_until(old, lambda folder=folder: len(parts(folder)) >= 4, "extract", "name=half", *overrides)
        assert not json.loads((folder / "_META.json").read_text())["complete"]
        assert list((folder / "lock").iterdir()), "the claim is missing"
        leave_half_a_file(folder / "data" / ".gare-0123456789abcdef.tmp")
    parts(store)[0].unlink()

    folder = ROOT / "whole/runs/killed"
    index = folder / "checkpoints/index.json"
    run_until(old, index.exists, "train", "train.run=killed", "train.epochs=20")
    assert not (folder / "result.json").exists()
    keep_one_checkpoint_and_a_half(index)
    run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    leave_outbox(ROOT / "whole/mlflow-pending.jsonl", run_id)
    pack(here / "root.tar.xz")


def write_weights() -> None:
    """Towers whose embeddings of 49,408 tokens repeat, so that all their copies pack well."""
    torch.manual_seed(0)
    config = parse_config(SETTINGS)
    model = GARE(config.model)
    with torch.no_grad():
        tokens = model.towers.clip.text_model.embeddings.token_embedding.weight
        tokens.copy_(tokens[:61].repeat(tokens.shape[0] // 61 + 1, 1)[: tokens.shape[0]])
    write_model(str(ROOT / "weights"), model)
    (ROOT / "weights" / CONFIG).write_text(config.to_yaml())


def run(old: Path, step: str, *overrides: str) -> None:
    subprocess.run(command(old, step, *overrides), cwd=old, check=True, stdout=subprocess.DEVNULL)


def command(old: Path, step: str, *overrides: str) -> list[str]:
    program = str(old / f"pipelines/{step}.py")
    return [sys.executable, program, "--config", str(ROOT / "gare.yaml"), *overrides]


def run_until(old: Path, condition: Any, step: str, *overrides: str) -> None:
    """Ends a step and all that it started with SIGKILL, as soon as the condition holds."""
    process = subprocess.Popen(command(old, step, *overrides), cwd=old)
    while not condition():
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.002)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    process.wait(20)


def parts(store: Path) -> list[Path]:
    return sorted(store.glob("data/part-*.parquet"))


def spoil_one_and_set_times(videos: Path) -> None:
    files = sorted(videos.glob("*.mp4"))
    files[0].write_bytes(b"no video")
    for number, file in enumerate(files):
        os.utime(file, (CHANGED_S + number, CHANGED_S + number))


def leave_half_a_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"PAR1 half a part")
    os.utime(path, (CHANGED_S, CHANGED_S))


def keep_one_checkpoint_and_a_half(index: Path) -> None:
    """The index names one checkpoint; of the next one two files are there, the model cut in the middle."""
    entries = json.loads(index.read_text())
    assert len(entries) == 1, "it was killed too late"
    first = index.parent / "epoch-{epoch:04d}-step-{step:08d}".format(**entries[0])
    for folder in index.parent.iterdir():
        if folder.is_dir() and folder != first:
            shutil.rmtree(folder)
    half = index.parent / "epoch-{:04d}-step-{:08d}".format(entries[0]["epoch"] + 1, entries[0]["step"] + 3)
    half.mkdir()
    shutil.copyfile(first / "config.yaml", half / "config.yaml")
    (half / "model.safetensors").write_bytes((first / "model.safetensors").read_bytes()[:4096])


def leave_outbox(path: Path, run_id: str) -> None:
    """Metrics and a tag that MLflow has not got, and the half line of a process that was killed."""
    for step in (1, 2):
        metric = {"key": "loss/waited", "value": 0.5 * step, "timestamp": CHANGED_S * 1000, "step": step}
        add(path, {"run_id": run_id, "metrics": [metric], "once": True})
    add(path, {"run_id": run_id, "tags": {"waited": "yes"}})
    with path.open("ab") as file:
        file.write(b'{"run_id": "' + run_id.encode()[:9])


def pack(archive: Path) -> None:
    def own(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        # Ray's record of a run and pictures, which no later version reads.
        if "/ray" in member.name or member.name.endswith(".png"):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime = int(member.mtime)
        return member

    with (
        lzma.open(archive, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path in sorted(ROOT.iterdir()):
            tar.add(path, path.name, filter=own)


if __name__ == "__main__":
    main()
