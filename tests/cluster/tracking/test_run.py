"""MLflow: a run that can be found again, complete, whatever happened to the server in between."""

from __future__ import annotations

import http.server
import json
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.tracking import (
    RunHandle,
    check_metric_names,
    connect,
    git_revision,
    resolve_tracking_uri,
    served,
    use_served_model,
)
from cluster.tracking import client as client_module
from cluster.tracking import run as run_module
from cluster.tracking.outbox import FileOutbox
from gare.config import TrackingConfig
from gare.errors import ConfigError, GareError, mask_secrets

SERVED = """
from pathlib import Path
import numpy as np
from cluster.tracking import serve_model

def load(folder):
    assert sorted(path.name for path in Path(folder).iterdir()) == ["config.yaml", "model.safetensors"]
    return int(Path(folder, "config.yaml").read_text())

def predict(width, captions):
    return np.array([[len(caption)] * width for caption in captions], np.float32)

serve_model(load, predict)
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_module._lost_at.clear()
    run_module._warned.clear()
    monkeypatch.setattr(run_module, "RETRY_AFTER_S", 0.0)
    # A stray relative path would show up here.
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose database is made once: MLflow's migrations take seconds."""
    root = tmp_path_factory.mktemp("a root")
    connect(TrackingConfig(), str(root))
    return root


class FakeServer:
    """Answers as an MLflow server does and remembers what it was sent; can be told to fail."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, object]]] = []
        self.status = 200
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.status == 200:
                    outer.posts.append((self.path.rsplit("mlflow/", 1)[1], body))
                text = "{}" if outer.status == 200 else '{"error_code": "X", "message": "no"}'
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


def test_relative_database_lies_below_the_root_wherever_the_job_runs(tmp_path: Path) -> None:
    # Else each job's working copy gets a database of its own, and `make ui` shows none of them.
    assert resolve_tracking_uri("sqlite:///mlflow.db", str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    for kept in ("sqlite:////x/y.db", "http://host:5000", "https://u:p@host/mlflow", "postgresql://u:p@h/db"):
        assert resolve_tracking_uri(kept, str(tmp_path)) == kept


@pytest.mark.parametrize(
    ("uri", "root", "message"),
    [
        ("sqlite:///mlflow.db", "s3://bucket/x", "MLflow server"),
        ("./mlruns", "/root", "no MLflow store"),
        ("file:///mlruns", "/root", "no MLflow store"),
        ("sqlite:///:memory:", "/root", "no file"),
        ("sqlite://", "/root", "no file"),
        ("http://", "/root", "no host"),
        ("htp://user:hunter2@host", "/root", "sqlite:///FILE.db"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_with_what_can(uri: str, root: str, message: str) -> None:
    # Else MLflow's own stack trace, or a run recorded where nobody looks.
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_tracking_uri(uri, root)
    assert "hunter2" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_passwords_are_masked() -> None:
    # Else the server's password is in every log file.
    assert mask_secrets("at http://me:se%20cret@h:1/x and") == "at http://***@h:1/x and"
    assert mask_secrets("postgresql://h/db?password=x&a=1") == "postgresql://h/db?password=***&a=1"
    assert "secret" not in repr(RunHandle("http://u:secret@h", "1", "2"))


def test_a_server_that_is_not_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a job waits for minutes, then ends in a stack trace with the password in it.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for scheme in ("http", "postgresql"):
        # Such a URI is refused where it is configured; what is said of one hides it all the same.
        uri = f"{scheme}://user:hunter2@127.0.0.1:{port}/db"
        settings = TrackingConfig.model_construct(uri=uri, experiment="gare")
        said = rf"{scheme}://\*\*\*@127.0.0.1:{port}.*start the server"
        with pytest.raises(GareError, match=said) as caught:
            connect(settings, "/nowhere")
        assert caught.value.exit_code == 4
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    # A firewall that swallows packets: MLflow's own patience is two minutes for each of eight tries.
    monkeypatch.setattr(client_module, "ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        with pytest.raises(GareError, match="cannot be used"):
            connect(TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), "/nowhere")


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    # Else MLflow retries for minutes on a file that was damaged.
    (tmp_path / "mlflow.db").write_bytes(b"not a database " * 100)
    with pytest.raises(GareError, match="not a database"):
        connect(TrackingConfig(), str(tmp_path))


def test_a_run_keeps_all_it_was_given(prepared: Path, tmp_path: Path) -> None:
    # Else the UI misses parameters, curves, data sets or pictures that the run had.
    tracker = connect(TrackingConfig(experiment="whole"), str(prepared))
    params = {"train": {"lr": 1e-4, "epochs": 5}, "long": "x" * 7000, **{f"p{i}": i for i in range(150)}}
    run = tracker.start_run("demo", params=params, tags={"git": "abc", **{f"t{i}": i for i in range(120)}})
    run = pickle.loads(pickle.dumps(run))
    for step in range(3):
        run.log_metrics({"loss": 1.0 / (step + 1), "t2v/R1": 50 + step, "nan": float("nan")}, step)
    run.log_dataset("demo", "d" * 64, "/data/manifest.parquet", "train", {"videos": 7})
    run.log_figure_bytes("curves.png", b"PNG")
    (tmp_path / "result.json").write_text("{}")
    run.log_artifact_file(tmp_path / "result.json", "results")
    run.finish()

    mlflow = client_module.client(run.tracking_uri)
    stored = mlflow.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "demo"
    assert stored.data.params["train.lr"] == "0.0001"
    assert len(stored.data.params) == 153
    assert len(stored.data.params["long"]) == 6000
    assert stored.data.tags["t119"] == "119"
    assert [m.value for m in mlflow.get_metric_history(run.run_id, "t2v/R1")] == [50, 51, 52]
    assert np.isnan(stored.data.metrics["nan"])
    [data] = stored.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("demo", "d" * 36)
    assert json.loads(data.dataset.profile) == {"videos": 7}
    assert stored.data.tags["data.demo.train"] == "d" * 64
    assert (prepared / "mlartifacts" / run.run_id / "artifacts/figures/curves.png").read_bytes() == b"PNG"
    assert (prepared / "mlartifacts" / run.run_id / "artifacts/results/result.json").exists()
    assert not list(Path.cwd().iterdir()), "MLflow wrote to the working directory"


def test_a_restart_continues_the_same_run(prepared: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Else each restart is a new run, and the curves are in pieces.
    tracker = connect(TrackingConfig(experiment="restart"), str(prepared))
    first = tracker.start_run("demo", params={"lr": 1, "same": 2})
    first.finish("FAILED")
    again = connect(TrackingConfig(experiment="restart"), str(prepared)).start_run(
        "demo", run_id=first.run_id, params={"lr": 3, "same": 2, "new": 4}
    )
    assert again.run_id == first.run_id
    stored = client_module.client(again.tracking_uri).get_run(again.run_id)
    assert stored.info.status == "RUNNING"
    assert stored.data.params == {"lr": "1", "same": "2", "new": "4"}
    assert stored.data.tags["resumed.lr"] == "3"
    assert "lr" in caplog.text
    # A run that was deleted, or is of another database, is not an error but a new run.
    client_module.client(again.tracking_uri).delete_run(again.run_id)
    assert tracker.start_run("demo", run_id=again.run_id).run_id != again.run_id
    assert tracker.start_run("demo", run_id="0" * 32).run_id != "0" * 32


def test_what_earlier_versions_logged_for_auto_is_the_same(prepared: Path) -> None:
    """A run that goes on with this version would else be said to have other settings than it began with."""
    run = connect(TrackingConfig(experiment="auto"), str(prepared)).start_run(
        "demo", params={"cluster": {"num_cpus": 0, "leave_cpus": -1}, "train": {"max_steps": 0}}
    )
    run.log_params({"cluster": {"num_cpus": "auto", "leave_cpus": "auto"}, "train": {"max_steps": 5}})
    tags = client_module.client(run.tracking_uri).get_run(run.run_id).data.tags
    assert {key for key in tags if key.startswith("resumed.")} == {"resumed.train.max_steps"}


def test_a_deleted_experiment_says_how_to_restore_it(prepared: Path) -> None:
    # Else MLflow's message, which names an id and no way out.
    tracker = connect(TrackingConfig(experiment="gone"), str(prepared))
    client_module.client(tracker.tracking_uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(GareError, match=f"restore --experiment-id {tracker.experiment_id}"):
        connect(TrackingConfig(experiment="gone"), str(prepared))


def test_a_lost_server_neither_stops_the_run_nor_loses_metrics(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Else a night of training dies with the tracking server, or its curve has a hole.
    pending = tmp_path / "pending.jsonl"
    run = RunHandle(server.uri, "1", "r" * 32, str(pending))
    run.log_metrics({"loss": 3.0}, 0)
    server.status = 503
    for step in (1, 2):
        run.log_metrics({"loss": 3.0 - step, "odd": float("inf")}, step)
    run.set_tags({"a": "b"})
    run.log_figure_bytes("x.png", b"")
    run.finish()
    assert len([r for r in caplog.records if "goes on; its entries" in r.message]) == 1
    assert "HTTP 503" in caplog.text
    assert len(pending.read_text().splitlines()) == 4
    with pending.open("a") as file:
        file.write('{"run_id": "torn')
    server.status = 200
    run.log_metrics({"loss": 0.0}, 3)
    assert pending.read_text() == ""
    batches = [body for path, body in server.posts if path == "runs/log-batch"]
    sent = [(row["step"], row["key"], row["value"]) for body in batches for row in body["metrics"]]
    assert sent == [
        (0, "loss", 3.0), (1, "loss", 2.0), (1, "odd", "Infinity"), (2, "loss", 1.0), (2, "odd", "Infinity"),
        (3, "loss", 0.0),
    ]  # fmt: skip
    [update] = [body for path, body in server.posts if path == "runs/update"]
    assert update["status"] == "FINISHED"


def test_a_run_that_goes_back_a_little_doubles_no_step(prepared: Path, tmp_path: Path) -> None:
    # Else curves run twice over what was done again, and a mean of them is of the wrong steps.
    run = connect(TrackingConfig(experiment="once"), str(prepared)).start_run("m")
    for step in (10, 20):
        run.log_metrics({"loss": 1.0 * step, "kappa": 0.5}, step, once=True)
    client_module._known.clear()  # a new process
    pending = tmp_path / "pending.jsonl"
    again = RunHandle(run.tracking_uri, run.experiment_id, run.run_id, str(pending))
    for step in (20, 30):
        again.log_metrics({"loss": 2.0 * step, "kappa": 0.6}, step, once=True)
    # What waited while the store was lost, and was kept by two processes that both came there.
    for _ in range(2):
        entry = {"metrics": [{"key": "loss", "value": 8.0, "timestamp": _, "step": 40}], "once": True}
        FileOutbox(str(pending)).add({"run_id": run.run_id, **entry})
    delivered = connect(TrackingConfig(experiment="once"), str(prepared)).deliver(str(pending))
    assert delivered["runs"] == [run.run_id]
    stored = client_module.client(run.tracking_uri)
    points = [(point.step, point.value) for point in stored.get_metric_history(run.run_id, "loss")]
    assert sorted(points) == [(10, 10.0), (20, 20.0), (30, 60.0), (40, 8.0)]
    kappas = [point.step for point in stored.get_metric_history(run.run_id, "kappa")]
    assert sorted(kappas) == [10, 20, 30]
    # What is measured anew is logged anew: an evaluation that is repeated.
    again.log_metrics({"loss": 5.0}, 10)
    assert len(stored.get_metric_history(run.run_id, "loss")) == 5


def test_a_torn_line_takes_no_other_with_it(tmp_path: Path) -> None:
    # A process that was killed while it wrote leaves half a line; the next one must not be glued to it.
    outbox = FileOutbox(str(tmp_path / "pending.jsonl"))
    outbox.add({"run_id": "a", "tags": {"n": "1"}})
    with Path(outbox.path).open("a") as file:
        file.write('{"run_id": "a", "tags": {"n"')
    outbox.add({"run_id": "b", "tags": {"n": "2"}})
    sent: list[dict[str, object]] = []
    outbox.deliver(sent.append)
    assert [entry["run_id"] for entry in sent] == ["a", "b"]


def test_a_torn_line_is_named_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A lost server is tried again every 20 s: a log of a night would be that line, 1,500 times."""
    outbox = FileOutbox(str(tmp_path / "pending.jsonl"))
    torn = [b'{"run_id": "a", "tags": {"n"', b"\xff", b"[]"]
    (tmp_path / "pending.jsonl").write_bytes(b"\n".join(torn))
    outbox.add({"run_id": "b", "tags": {"n": "2"}})

    def lost(_: dict[str, object]) -> None:
        raise ConnectionError("lost")

    for _ in range(3):
        with pytest.raises(ConnectionError):
            outbox.deliver(lost)
    assert outbox.deliver(lambda _: None) == 1
    assert [record.args[1] for record in caplog.records if record.args] == [1, 2, 3]
    assert (tmp_path / "pending.jsonl").read_bytes() == b""
    assert (tmp_path / "pending.jsonl.damaged").read_bytes().splitlines() == torn


def test_what_a_server_refuses_does_not_block_the_rest(server: FakeServer, tmp_path: Path) -> None:
    # Else one bad entry keeps a run's later metrics in the file for ever.
    pending = tmp_path / "pending.jsonl"
    run = RunHandle(server.uri, "1", "r" * 32, str(pending))
    server.status = 503
    run.log_metrics({"loss": 1}, 0)
    server.status = 400
    run.log_metrics({"loss": 1}, 1)
    assert pending.read_text() == ""


def test_metric_names_are_checked_before_anything_is_sent() -> None:
    # Else R@1 fails in the store, after an epoch of training.
    check_metric_names(["t2v/R1", "dsl/t2v/R1", "loss", "val.loss-x"])
    for bad in ("t2v/R@1", "", "/x", "a//b", "a/../b", "é", "x" * 251, "a%"):
        with pytest.raises(GareError, match="not allowed"):
            check_metric_names([bad])


def test_the_logged_model_answers_captions(prepared: Path, tmp_path: Path) -> None:
    # Else the registry holds models that nobody can use.
    checkpoint = tmp_path / "best"
    checkpoint.mkdir()
    (checkpoint / "config.yaml").write_text("4")
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "trainer.pt").write_bytes(b"optimiser")
    (tmp_path / "served_model.py").write_text(SERVED)
    run = connect(TrackingConfig(experiment="model"), str(prepared)).start_run("m")
    uri = run.log_model(checkpoint, tmp_path / "served_model.py", embed_dim=4, requirements=["numpy"], step=7)
    assert uri.startswith("models:/m-")
    model = use_served_model(run.tracking_uri, uri)
    np.testing.assert_array_equal(model.predict(["a", "bcd"]), np.array([[1] * 4, [3] * 4], np.float32))
    assert model.metadata.signature.inputs.to_dict() == [{"type": "string", "required": True}]
    assert model.metadata.signature.outputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 4)
    stored = client_module.client(run.tracking_uri)
    assert stored.get_logged_model(uri.removeprefix("models:/")).status == "READY"
    assert [output.step for output in stored.get_run(run.run_id).outputs.model_outputs] == [7]
    files = [path.name for path in (prepared / "mlartifacts").rglob("*")]
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt"))]
    assert not list(Path.cwd().iterdir())


PICKLED = """
import sys
from pathlib import Path
import mlflow

class Bomb(mlflow.pyfunc.PythonModel):
    def __reduce__(self):
        return Path.touch, (Path(sys.argv[2]),)
    def predict(self, context, model_input, params=None): ...

mlflow.pyfunc.save_model(sys.argv[1], python_model=Bomb(), pip_requirements=["numpy"])
"""


def test_a_pickled_model_of_the_registry_is_refused(prepared: Path, tmp_path: Path) -> None:
    # Else a model that is passed on runs what it likes where it is loaded, without a line of code to be seen.
    proof, packed = tmp_path / "proof", tmp_path / "packed"
    command = [sys.executable, "-W", "ignore", "-c", PICKLED, str(packed), str(proof)]
    subprocess.run(command, check=True, capture_output=True)
    assert (packed / "python_model.pkl").exists()
    assert not proof.exists()
    mlflow = client_module.mlflow_module()
    run = connect(TrackingConfig(experiment="pickled"), str(prepared)).start_run("m")
    model = mlflow.models.Model.load(str(packed))
    uri = served.upload_model(run.tracking_uri, run.experiment_id, run.run_id, model, packed, 0)
    with pytest.raises(GareError, match="may be a pickle"):
        use_served_model(run.tracking_uri, uri)
    # MLflow's own loader, which README shows, refuses it as well in a process of ours.
    with pytest.raises(mlflow.MlflowException, match="pickle is disallowed"):
        mlflow.pyfunc.load_model(str(packed))
    assert not proof.exists()


def test_broken_model_code_is_an_error_that_names_the_checkpoint(prepared: Path, tmp_path: Path) -> None:
    # Else a mistake in the serving code passes as a lost server.
    (tmp_path / "served_model.py").write_text("raise ValueError('typo')")
    (tmp_path / "best").mkdir()
    run = connect(TrackingConfig(experiment="broken"), str(prepared)).start_run("m")
    with pytest.raises(GareError, match="typo"):
        run.log_model(tmp_path / "best", tmp_path / "served_model.py", embed_dim=4, requirements=["numpy"])


def test_two_first_starts_at_once(tmp_path: Path) -> None:
    # Else two jobs submitted together break the new database: both run MLflow's migrations. And importing
    # must be quick, or every --help waits for MLflow; using it quiet, or its log hides the program's lines.
    script = (
        "import sys; from cluster.tracking import connect; from gare.config import TrackingConfig\n"
        "assert not {'mlflow', 'sqlalchemy', 'torch', 'ray', 'numpy'} & set(sys.modules)\n"
        f"connect(TrackingConfig(), {str(tmp_path / 'new')!r}).start_run('x').finish()\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    outputs = [child.communicate()[0].decode() for child in both]
    assert [child.returncode for child in both] == [0, 0], outputs
    assert outputs == ["", ""]
    tracker = connect(TrackingConfig(), str(tmp_path / "new"))
    assert len(client_module.client(tracker.tracking_uri).search_runs([tracker.experiment_id])) == 2


def test_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a run says it is of a commit that it is not of.
    monkeypatch.delenv("GARE_GIT_REVISION", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision(tmp_path) == "unknown"
    assert git_revision(tmp_path / "missing") == "unknown"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "x")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("GARE_GIT_REVISION", "abc")
    assert git_revision(tmp_path) == "abc"
