"""Outputs of a finished training for MLflow besides its metrics: pictures, configuration, model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cluster.tracking import RunHandle
from gare.storage.run_folder import RunFolder
from gare.train.checkpoint.history import History


def log_outputs(folder: RunFolder, handle: RunHandle, embed_dim: int) -> str:
    """Uploads the curves, the configuration and the best checkpoint as a model.

    Args:
        folder: the run.
        handle: the MLflow run.
        embed_dim: width of the model's embeddings, for the model's signature.

    Returns:
        The model's URI, ``models:/…``; empty if MLflow was lost.
    """
    from gare.report.figures import increments_picture
    from gare.report.pictures import curves_picture
    from gare.train.checkpoint.files import TRAINER, copy_checkpoint

    history = History.read(folder.history)
    losses = {name: points for name, points in history.steps.items() if name.startswith("loss/")}
    recalls = {name: points for name, points in history.epochs.items() if name.endswith("R1")}
    png = curves_picture(losses | recalls, title=folder.name, accuracy_axis="epoch")
    handle.log_figure_bytes("curves.png", png)
    if geometry := increments_picture(history.steps, f"{folder.name}: geometry of Δ"):
        handle.log_figure_bytes("increments.png", geometry)
    with tempfile.TemporaryDirectory() as local:
        copy_checkpoint(folder.best, local, leave_out=(TRAINER,))
        handle.log_artifact_file(Path(local) / "config.yaml")
        return handle.log_model(
            local,
            Path(__file__).parents[1] / "evaluating" / "served_model.py",
            embed_dim=embed_dim,
            requirements=["torch", "transformers", "safetensors", "instant-clip-tokenizer", "ftfy"],
        )
