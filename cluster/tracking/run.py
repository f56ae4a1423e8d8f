"""An MLflow run that any process can write to, even while the server is down."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from cluster.runtime.signals import asked_by, shielded
from cluster.tracking import client, outbox, registry, served
from gare.errors import GareError, LockLostError, StoppedError, mask_secrets

logger = logging.getLogger(__name__)

#: MLflow's tag for a run's description, our tag for the hash of the description that we wrote (MLflow's pages
#: hide tags with that prefix), and the maximum length of a tag.
NOTE, WRITTEN_NOTE, NOTE_LENGTH = "mlflow.note.content", "mlflow.note.written", 8000

Status = Literal["FINISHED", "FAILED", "KILLED"]
T = TypeVar("T")

#: Seconds before a lost store is tried again: a training step must not wait for it.
RETRY_AFTER_S = 20.0

# Per process: time at which each store was last found lost, by tracking URI; warnings given for each run.
_lost_at: dict[str, float] = {}
_warned: set[tuple[str, str]] = set()
# Runs that this process has started and not finished, with the status that an interrupt gives each.
_open: dict[str, tuple[RunHandle, Status]] = {}


@dataclass(frozen=True)
class RunHandle:
    """Handle of one run, which any process can write to; small and picklable."""

    tracking_uri: str = field(repr=False)  # may hold a password
    experiment_id: str
    run_id: str
    pending: str | outbox.Outbox = ""

    @property
    def _outbox(self) -> outbox.Outbox | None:
        return (
            outbox.FileOutbox(self.pending)
            if isinstance(self.pending, str) and self.pending
            else (self.pending or None)
        )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters; nested mappings become dotted keys, long values are cut.

        MLflow never changes a parameter: if a resumed run has another value, the first one stays and the new
        one becomes the tag ``resumed.KEY``.

        Raises:
            Exception: from MLflow, if the store does not take them.
        """
        flat = {key: str(value)[:6000] for key, value in _flatten(params)}
        changed = client.add_params(self.tracking_uri, self.run_id, flat)
        if changed:
            logger.warning("MLflow keeps the first value of %s; the new values are tags", ", ".join(changed))
            self.set_tags({f"resumed.{key}": value for key, value in changed.items()})

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        step: int,
        *,
        dataset: tuple[str, str] | None = None,
        model: str = "",
        once: bool = False,
    ) -> None:
        """Logs metrics of a step. If the store is lost, warns once, keeps them in ``pending`` and goes on.

        Args:
            metrics: values by name.
            step: step that they belong to.
            dataset: name and digest of the data set that they were measured on, as given to ``log_dataset``.
            model: URI of the logged model that they belong to, as returned by ``log_model``.
            once: leave them all out if the run already has the first of them at that step, as happens after
                resuming from an earlier step.

        Raises:
            GareError: for a metric name that MLflow does not allow.
        """
        check_metric_names(metrics)
        now_ms = time.time_ns() // 1_000_000
        about = client.measured_on(*dataset) if dataset else {}
        if model:
            about["model_id"] = model.removeprefix("models:/")
        rows = [
            {"key": key, "value": float(value), "timestamp": now_ms, "step": int(step), **about}
            for key, value in metrics.items()
        ]
        for chunk in _chunks(rows, outbox.MAX_METRICS):
            self._deliver({"metrics": chunk} | ({"once": True} if once else {}))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags; handles a lost store like ``log_metrics``."""
        for chunk in _chunks([(key, str(value)[:8000]) for key, value in tags.items()], outbox.MAX_TAGS):
            self._deliver({"tags": dict(chunk)})

    def describe(self, markdown: str) -> None:
        """Sets the description on the run's page, unless a person has written one there.

        If the store is lost, warns and sets none.
        """
        text = markdown[:NOTE_LENGTH]
        digest = hashlib.sha256(text.encode()).hexdigest()

        def write(stored: Any) -> None:
            tags = client.tags_of(self.tracking_uri, self.run_id)
            note = tags.get(NOTE, "")
            if not note or hashlib.sha256(note.encode()).hexdigest() == tags.get(WRITTEN_NOTE):
                self.set_tags({NOTE: text, WRITTEN_NOTE: digest})

        self._attempt("the description", write)

    def finish(self, status: Status = "FINISHED") -> None:
        """Ends the run; handles a lost store like ``log_metrics``."""
        with shielded():
            _lost_at.pop(self.tracking_uri, None)  # the last chance, so try at once
            self._deliver({"status": status, "end_time": time.time_ns() // 1_000_000})
            _open.pop(self.run_id, None)

    def deliver_pending(self, seen: Callable[[outbox.Entry], None] = lambda entry: None) -> int:
        """Delivers the entries in ``pending``, of this and other runs; returns their number.

        Args:
            seen: called with each entry, or with the entry that several were joined to, once it is delivered.

        Raises:
            Exception: any that keeps the store from answering; the file stays as it was.
        """

        def send(entry: outbox.Entry) -> None:
            self._send(entry)
            seen(entry)

        return self._outbox.deliver(send) if self._outbox else 0

    def log_artifact_file(self, path: str | Path, folder: str = "") -> None:
        """Uploads a local file. If the store is lost, warns and uploads nothing."""
        name = Path(path).name
        self._attempt(name, lambda mlflow: mlflow.log_artifact(self.run_id, str(path), folder or None))

    def log_figure_bytes(self, name: str, png: bytes) -> None:
        """Uploads a picture as ``figures/NAME``. If the store is lost, warns and uploads nothing."""
        target = Path("figures") / name
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / target.name
            path.write_bytes(png)
            self.log_artifact_file(path, target.parent.as_posix())

    def log_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Uploads a mapping as a JSON file. If the store is lost, warns and uploads nothing."""
        self._attempt(name, lambda mlflow: mlflow.log_dict(self.run_id, dict(content), name))

    def log_text(self, name: str, text: str) -> None:
        """Uploads a text file. If the store is lost, warns and uploads nothing."""
        self._attempt(name, lambda mlflow: mlflow.log_text(self.run_id, text, name))

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Uploads a table that MLflow's pages show. If the store is lost, warns and uploads nothing.

        Args:
            name: file name, ending in ``.json``.
            columns: values by column, the same number in each.
        """
        table = {key: list(values) for key, values in columns.items()}
        with warnings.catch_warnings():
            # MLflow 3.17 calls pandas in a way that pandas 3 deprecates.
            warnings.simplefilter("ignore")
            self._attempt(name, lambda mlflow: mlflow.log_table(self.run_id, table, name))

    def log_dataset(
        self, name: str, digest: str, source: str, context: str, counts: Mapping[str, int] | None = None
    ) -> None:
        """Links a data set to the run.

        Args:
            name: its name.
            digest: its fingerprint; MLflow keeps 36 characters, the tag ``data.NAME.CONTEXT`` keeps all.
            source: its location.
            context: its use, such as ``train``.
            counts: sizes to show with it.
        """
        self._attempt(
            f"data set {name}",
            lambda _: client.link_dataset(
                self.tracking_uri,
                self.run_id,
                name=name,
                digest=digest,
                source=mask_secrets(source),
                context=context,
                profile=counts or {},
            ),
        )
        self.set_tags({f"data.{name}.{context}": digest})

    def log_model(
        self,
        checkpoint: str | Path,
        code: str | Path,
        *,
        embed_dim: int,
        ranked: bool = False,
        requirements: Sequence[str],
        code_paths: Sequence[str | Path] = (),
        example: Sequence[str] = ("a man plays guitar", "a red circle moves to the left"),
        leave_out: Sequence[str] = ("trainer.pt",),
        step: int = 0,
    ) -> str:
        """Logs a checkpoint as a model for ``mlflow.pyfunc.load_model``; nothing in it is pickled.

        Args:
            checkpoint: local checkpoint folder.
            code: the Python file that calls ``serve_model``.
            ranked: True if it answers with ranked ``video_ids`` and ``scores`` in place of embeddings.
            embed_dim: D of the (captions, D) float32 embeddings that it returns.
            requirements: pip requirements; given, so that MLflow does not try to infer them.
            code_paths: packages to copy into the model, for places where they are not installed.
            example: captions as an input example.
            leave_out: file patterns of the checkpoint that serving does not need.
            step: training step of the checkpoint.

        Returns:
            The model's URI, ``models:/…``; empty if the store was lost.

        Raises:
            GareError: if code and checkpoint make no valid model.
        """
        with tempfile.TemporaryDirectory() as folder:
            staged, packed = Path(folder) / "checkpoint", Path(folder) / "model"
            try:
                shutil.copytree(checkpoint, staged, ignore=shutil.ignore_patterns(*leave_out))
                model = served.pack_model(
                    packed,
                    staged,
                    Path(code),
                    embed_dim=embed_dim,
                    ranked=ranked,
                    requirements=requirements,
                    code_paths=[str(path) for path in code_paths],
                    example=example,
                )
            except Exception as error:
                raise GareError(
                    f"cannot build a model from it: {one_line_error(error)}", where=str(checkpoint)
                ) from error
            return (
                self._attempt(
                    "the model",
                    lambda _: served.upload_model(
                        self.tracking_uri, self.experiment_id, self.run_id, model, packed, step
                    ),
                )
                or ""
            )

    def register(self, name: str, model: str, *, val_score: float | None, val_hash: str) -> str:
        """Registers a model of this run; if the store is lost, warns and returns an empty string."""
        return (
            self._attempt(
                f"version of {name}",
                lambda _: registry.register(
                    self.tracking_uri, name, model, self.run_id, val_score=val_score, val_hash=val_hash
                ),
            )
            or ""
        )

    def versions(self, name: str) -> list[str]:
        """Returns the versions of a registered model that come from this run."""
        return (
            self._attempt(
                f"question for {name}",
                lambda _: registry.versions_of_run(self.tracking_uri, name, self.run_id),
            )
            or []
        )

    def _send(self, entry: outbox.Entry) -> None:
        try:
            client.send(self.tracking_uri, entry)
        except client.RefusedError as error:
            # It would be refused again and again, and block the entries after it.
            self._warn_once("refused", f"MLflow refuses something of run {entry['run_id']}", error)

    def _deliver(self, entry: outbox.Entry) -> None:
        with shielded():  # a server has seconds to answer here
            self._deliver_or_keep({"run_id": self.run_id, **entry})

    def _deliver_or_keep(self, entry: outbox.Entry) -> None:
        lost_at = _lost_at.get(self.tracking_uri)
        resting = lost_at is not None and time.monotonic() - lost_at < RETRY_AFTER_S
        try:
            if resting:
                raise ConnectionError("it did not answer a moment ago")
            self.deliver_pending()
            self._send(entry)
            _lost_at.pop(self.tracking_uri, None)
        except Exception as error:
            if not resting:
                _lost_at[self.tracking_uri] = time.monotonic()
            kept = f"kept in {self.pending} and delivered later" if self.pending else "dropped"
            self._warn_once("lost", f"MLflow does not answer, the run goes on; its entries are {kept}", error)
            self._keep(entry)

    def _keep(self, entry: outbox.Entry) -> None:
        if self._outbox:
            try:
                self._outbox.add(entry)
            except Exception as error:
                self._warn_once("pending", f"{self.pending} cannot be written", error)

    def _attempt(self, what: str, action: Callable[[Any], T]) -> T | None:
        try:
            client.check_answers(self.tracking_uri)  # the call itself would retry for minutes
            with uninterrupted_transactions(self.tracking_uri):
                return action(client.client(self.tracking_uri))
        except Exception as error:
            logger.warning("MLflow did not get %s, the run goes on: %s", what, one_line_error(error))
            return None

    def _warn_once(self, kind: str, message: str, error: Exception) -> None:
        if (self.run_id, kind) not in _warned:
            _warned.add((self.run_id, kind))
            logger.warning("%s: %s", message, one_line_error(error))


def uninterrupted_transactions(tracking_uri: str) -> AbstractContextManager[None]:
    """Delays interrupts during a database's transactions, which would stay locked, even for this process.

    Requests to a server can be interrupted: it may hang, uploads take long, and no lock stays here.
    """
    return nullcontext() if client.is_server(tracking_uri) else shielded()


def note_open(run: RunHandle, when_interrupted: Status) -> None:
    """Marks a run as started by this process, so that ``finish_open_runs`` finishes it."""
    _open[run.run_id] = (run, when_interrupted)


def finish_open_runs(error: BaseException) -> None:
    """Finishes the runs that are still open at the end of a command, whatever ended it."""
    for run, when_interrupted in list(_open.values()):
        run.finish(when_interrupted if when_interrupted == "FINISHED" else status_after(error))


def status_after(error: BaseException | None) -> Status:
    """Returns the status of a run that ends with this error: killed if somebody stopped it, else failed."""
    if error is None:
        return "FINISHED"
    if asked_by() or isinstance(error, StoppedError | LockLostError | KeyboardInterrupt):
        return "KILLED"
    return "FAILED"


def check_metric_names(names: Iterable[str]) -> None:
    """Raises GareError for names that MLflow does not allow, such as ``R@1``."""
    for name in names:
        allowed = re.fullmatch(r"[\w.: -]+(/[\w.: -]+)*", name, re.ASCII)
        if not allowed or len(name) > 250 or {".", ".."} & set(name.split("/")):
            raise GareError(
                f"metric name {name!r} is not allowed in MLflow",
                accepted="letters, digits, _ - . : space, and / between parts; 250 characters at most",
            )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def one_line_error(error: Exception) -> str:
    """Returns the error on one line, without credentials."""
    text = " ".join(mask_secrets(str(error)).split())
    return f"{type(error).__name__}: {text[:400]}"
