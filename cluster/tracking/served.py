"""Checkpoints as models in MLflow: packed from code and weights, never pickled, and loaded again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.tracking.client import client, mlflow_module
from gare.errors import GareError

#: MLflow's loader for models whose code is a file; models with other loaders may contain pickles.
_CODE_LOADER = "mlflow.pyfunc.loaders.code_model"


def pack_model(
    folder: Path,
    checkpoint: Path,
    code: Path,
    *,
    embed_dim: int,
    ranked: bool,
    requirements: Sequence[str],
    code_paths: Sequence[str],
    example: Sequence[str],
) -> Any:
    """Writes a model folder from code and a checkpoint; returns MLflow's description of it."""
    mlflow = mlflow_module()
    import numpy as np

    types = mlflow.types
    outputs = types.Schema([types.TensorSpec(np.dtype(np.float32), (-1, embed_dim))])
    if ranked:
        columns = (("video_ids", types.DataType.string), ("scores", types.DataType.double))
        outputs = types.Schema([types.ColSpec(types.schema.Array(kind), name) for name, kind in columns])

    model = mlflow.models.Model()
    mlflow.pyfunc.save_model(
        str(folder),
        mlflow_model=model,
        python_model=str(code),
        artifacts={"checkpoint": str(checkpoint)},
        # A named column would refuse a plain list of captions.
        signature=mlflow.models.ModelSignature(
            inputs=types.Schema([types.ColSpec(types.DataType.string)]),
            outputs=outputs,
        ),
        input_example=list(example),
        pip_requirements=list(requirements),
        code_paths=list(code_paths) or None,
    )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)
    return model


def upload_model(uri: str, experiment_id: str, run_id: str, model: Any, folder: Path, step: int) -> str:
    """Uploads a packed model as an output of the run; returns its ``models:/`` URI."""
    output = mlflow_module().entities.LoggedModelOutput

    logged = client(uri).create_logged_model(
        experiment_id, name="model", source_run_id=run_id, model_type="retrieval"
    )
    try:
        model.run_id, model.model_id, model.model_uuid = run_id, logged.model_id, logged.model_id
        model.artifact_path = logged.artifact_location
        model.save(str(folder / "MLmodel"))
        client(uri).log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client(uri).finalize_logged_model(logged.model_id, "FAILED")
        raise
    client(uri).finalize_logged_model(logged.model_id, "READY")
    client(uri).log_outputs(run_id, [output(logged.model_id, step=step)])
    return f"models:/{logged.model_id}"


def serve_model(load: Callable[[str], Any], predict: Callable[[Any, list[str]], Any]) -> None:
    """Turns a Python file into a model; call it at the end of the file given to ``RunHandle.log_model``.

    Args:
        load: called with the checkpoint folder; returns any value that ``predict`` needs.
        predict: called with that value and the captions; returns a float32 array (captions, D), or a mapping
            for each caption.
    """
    mlflow = mlflow_module()

    # No type hint on the input: MLflow would derive the signature from it and drop the one given.
    def answer(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        rows = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        return predict(self.loaded, [str(row) for row in rows])

    def load_context(self: Any, context: Any) -> None:
        self.loaded = load(context.artifacts["checkpoint"])

    # The flag keeps MLflow from wrapping predict, and from asking for a type hint on stderr each time.
    methods = {"predict": answer, "load_context": load_context, "_skip_type_hint_validation": True}
    served = type("Served", (mlflow.pyfunc.PythonModel,), methods)
    mlflow.models.set_model(served())


def use_served_model(tracking_uri: str, model_uri: str) -> Any:
    """Loads a logged model, for use as ``predict(["a man plays guitar"])``.

    Its code is executed, like that of every model in a registry; nothing is unpickled.

    Args:
        tracking_uri: the store that it is in.
        model_uri: URI returned by ``RunHandle.log_model``, or ``models:/NAME@ALIAS`` of the registry.

    Raises:
        GareError: for a model that is a pickle or belongs to another library.
    """
    name, _, alias = model_uri.removeprefix("models:/").partition("@")
    if alias:
        folder = client(tracking_uri).get_model_version_by_alias(name, alias).source
    else:
        folder = client(tracking_uri).get_logged_model(name).artifact_location
    mlflow = mlflow_module()
    # Downloaded first: load_model knows only the global tracking URI.
    local = mlflow.artifacts.download_artifacts(artifact_uri=folder, tracking_uri=tracking_uri)
    flavour = mlflow.models.Model.load(local).flavors.get("python_function", {})
    if flavour.get("loader_module") != _CODE_LOADER or not flavour.get("model_code_path"):
        raise GareError(
            "is not a model of code and weights, and may be a pickle, which can run any program",
            where=model_uri,
            accepted="one that train or evaluate has logged",
        )
    return mlflow.pyfunc.load_model(local)
