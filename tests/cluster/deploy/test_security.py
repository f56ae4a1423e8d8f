"""What cluster/deploy lets in and gives away: secrets, tokens, open ports, users, the upload."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.deploy.support import DEPLOY, commands, compose, manifests, nodes

UPLOAD_LIMIT_BYTES = 2_000_000
#: A name whose value is a secret.
SECRET = re.compile(r"password|passwd|secret|token|access_?key|credential", re.IGNORECASE)
#: What gives a secret away wherever it stands: a password in an address, a key of AWS, a private key, and
#: anything long and random.
LITERALS = (
    re.compile(r"://[^\s/@:]*:[^\s/@]+@"),
    re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"BEGIN [A-Z ]*PRIVATE KEY"),
    re.compile(r"\b(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9+/]{24,}"),
)


def literals_in(text: str) -> list[str]:
    return [found.group() for pattern in LITERALS for found in pattern.finditer(text)]


def given_values() -> Iterator[tuple[str, str, Any]]:
    """(file, name, value) of every variable that a file sets for a process."""
    for path, document in manifests():
        for node in nodes(document):
            for entry in node.get("env", []):
                yield path.name, entry["name"], entry.get("value", entry.get("valueFrom"))
    for name, service in compose()["services"].items():
        for key, value in service.get("environment", {}).items():
            yield f"compose.yaml {name}", key, value
    for line in (DEPLOY / "compose.env.example").read_text().splitlines():
        if line and not line.startswith("#"):
            yield "compose.env.example", *line.split("=", 1)


def test_no_file_holds_a_secret() -> None:
    """Else whoever reads the repository may use, or change, what a cluster holds."""
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 12
    for path in files:
        assert not literals_in(path.read_text()), path
    assert not [document for _, document in manifests() if document["kind"] == "Secret"]
    seen = 0
    for where, name, value in given_values():
        if SECRET.search(name):
            seen += 1
            if isinstance(value, dict):
                assert set(value) == {"secretKeyRef"}, (where, name)
            else:
                # Without a default: a forgotten one stops the start.
                assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}|", value), (where, name)
    assert seen >= 8


@pytest.mark.parametrize(
    "line",
    [
        "postgresql://mlflow:hunter2@postgres/mlflow",
        "AWS_ACCESS_KEY_ID: AKIA" + "Q" * 16,
        "-----BEGIN RSA PRIVATE KEY-----",
        "RAY_AUTH_TOKEN=" + "0123456789abcdef" * 2,
    ],
)
def test_the_search_for_secrets_finds_one(line: str) -> None:
    """A search that finds nothing, whatever is there, protects nobody."""
    assert literals_in(line)


def test_token_authentication_is_on_everywhere() -> None:
    """Else whoever reaches a cluster's port runs what they like on it."""
    clusters = [node for _, document in manifests() for node in nodes(document) if "headGroupSpec" in node]
    assert len(clusters) == 4
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token"}
    head = compose()["services"]["ray-head"]["environment"]
    assert head["RAY_AUTH_MODE"] == "token"
    assert head["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    launcher = yaml.safe_load((DEPLOY / "aws.yaml").read_text())
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert launcher["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "RAY_AUTH_MODE=token" in (DEPLOY / "crontab").read_text()
    assert re.search(r"RAY_AUTH_MODE=token", (DEPLOY / "Dockerfile").read_text())
    # No file takes it back.
    for path in DEPLOY.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            for value in re.findall(r"RAY_AUTH_MODE\W+(\w+)", path.read_text()):
                assert value in ("token", "RAY_AUTH_MODE"), path


def test_nothing_listens_beyond_its_machine_unless_told() -> None:
    """Else a dashboard, which runs code, and MLflow, which has no accounts, are open to the network."""
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("${GARE_BIND:-127.0.0.1}:") for port in ports)
    services = [document for _, document in manifests() if document["kind"] == "Service"]
    assert services
    assert all(service["spec"].get("type", "ClusterIP") == "ClusterIP" for service in services)
    assert not [document for _, document in manifests() if document["kind"] == "Ingress"]
    for command in commands():
        for word in command.words:
            if word.startswith(("--dashboard-host", "--host")) and not word.endswith("=127.0.0.1"):
                # In a container, whose ports are published as the rest of this test says.
                assert command.where.startswith(("compose.yaml", "mlflow.yaml")), command
    policies = {d["metadata"]["name"] for _, d in manifests() if d["kind"] == "NetworkPolicy"}
    assert policies == {"gare-mlflow", "gare-postgres"}


def test_no_pod_is_root_or_may_become_it() -> None:
    """Else a damaged video that takes over its decoder has the node too."""
    pods = [node for _, document in manifests() for node in nodes(document) if "containers" in node]
    assert len(pods) >= 10
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE) == ["1000:1000"]


def test_the_role_of_the_schedule_is_over_its_jobs_alone() -> None:
    """Else who gets into the nightly pod may read the secrets of the namespace."""
    [role] = [document for _, document in manifests() if document["kind"] == "Role"]
    [rule] = role["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    assert not [document for _, document in manifests() if document["kind"].startswith("ClusterRole")]


@pytest.fixture
def working_copy(repository: Path, tmp_path: Path) -> Path:
    """The repository as a person has it: what git knows, and beside it what must stay out of an upload."""
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    copy = tmp_path / "copy"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in names:
        if name and (repository / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((repository / name).read_bytes())
    return copy


LITTER = (
    ".venv/lib/python3.11/site-packages/torch/lib.so",
    ".git/objects/pack/pack",
    "gare/__pycache__/config.cpython-311.pyc",
    ".mypy_cache/3.11/cache.db",
    "gare.egg-info/SOURCES.txt",
    "build/lib/gare/config.py",
    "mlflow.db",
    "mlartifacts/1/run/artifacts/model.safetensors",
    "data/frames/part-0.parquet",
    "clip.mp4",
    "ViT-B-32.pt",
    "model.safetensors",
    "compose.env",
    ".env",
)


def test_upload_of_a_job_is_small_and_holds_what_runs(working_copy: Path, tmp_path: Path, rng: Any) -> None:
    """Else every submission sends gigabytes, or a secret that lies about, or lacks what the job needs."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    for name in LITTER:
        (working_copy / name).parent.mkdir(parents=True, exist_ok=True)
        (working_copy / name).write_bytes(rng.bytes(3_000_000))
    package = tmp_path / "package.zip"
    create_package(os.fspath(working_copy), package, include_gitignore=True)
    size = package.stat().st_size
    with zipfile.ZipFile(package) as archive:
        uploaded = set(archive.namelist())
    print(f"upload: {len(uploaded)} files, {size} bytes")
    assert size < UPLOAD_LIMIT_BYTES
    assert not uploaded & set(LITTER)
    for path in [*working_copy.glob("gare/**/*.py"), *working_copy.glob("conf/*.yaml")]:
        name = str(path.relative_to(working_copy))
        assert name in uploaded or "build/" in name
    assert {
        "pipelines/train.py",
        "cluster/runtime/session.py",
        "cluster/deploy/prepare-and-extract.sh",
    } <= uploaded
