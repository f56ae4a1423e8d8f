"""Every file of cluster/deploy against the schema of what reads it, since no engine here runs them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.cluster.deploy.support import (
    DEPLOY,
    KUBERNETES,
    compact,
    documents,
    manifests,
    operator_schema,
)

MANIFESTS = [
    pytest.param(path, document, id=f"{path.stem}-{document['kind']}-{document['metadata']['name']}")
    for path, document in manifests()
]


def faults_of(document: dict[str, Any], shared: Path) -> list[str]:
    """What the Ray operator's schema has against a document."""
    validator = Draft202012Validator(operator_schema(shared, document["kind"]))
    return [compact(error) for error in validator.iter_errors(document)]


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A checker from the environment that runs these tests."""
    return subprocess.run(
        [str(Path(sys.executable).with_name(name)), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("path", "document"), MANIFESTS)
def test_kubernetes_takes_every_manifest(path: Path, document: dict[str, Any], shared: Path) -> None:
    """Else `kubectl apply` refuses it, or drops a field in silence and runs something else."""
    if document["apiVersion"] == "ray.io/v1":
        assert not faults_of(document, shared)
        # Pods inside a custom resource are Kubernetes' own; the operator's copy of their schema may be older.
        for template in pod_templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, "1.37", strict=True)
    else:
        kubernetes_validate.validate(document, "1.37", strict=True)


def pod_templates(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, dict):
        own = [tree["template"]] if isinstance(tree.get("template"), dict) else []
        return own + [found for value in tree.values() for found in pod_templates(value)]
    return [found for value in tree for found in pod_templates(value)] if isinstance(tree, list) else []


def test_the_check_of_custom_resources_finds_what_the_api_server_would_drop(shared: Path) -> None:
    """Else a mistyped field passes here, is dropped there, and authentication is off in silence."""
    [job] = documents(KUBERNETES / "rayjob-extract.yaml")
    for path, key, value in (
        (["spec"], "shutdownAfterJobFinish", True),
        (["spec", "rayClusterSpec"], "authOption", {"mode": "token"}),
        (["spec", "rayClusterSpec", "authOptions"], "mode", "none"),
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec"], "container", []),
        (["spec"], "backoffLimit", "1"),
    ):
        broken = copy.deepcopy(job)
        node = broken
        for step in path:
            node = node[step]
        node[key] = value
        assert len(faults_of(broken, shared)) == 1, (path, key)


def test_both_schedules_run_the_job_that_runs_by_hand() -> None:
    """Else the night's job differs from the one that a person has tried."""
    [job] = documents(KUBERNETES / "rayjob-extract.yaml")
    [scheduled] = documents(KUBERNETES / "raycronjob-extract.yaml")
    assert scheduled["spec"]["jobTemplate"] == job["spec"]
    [cron] = [document for _, document in manifests() if document["kind"] == "CronJob"]
    [container] = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    [kustomization] = documents(KUBERNETES / "kustomization.yaml")
    mounted = {f"/etc/gare/{name}" for name in kustomization["configMapGenerator"][0]["files"]}
    assert set(container["command"][1:]) == mounted
    assert cron["spec"]["schedule"] == scheduled["spec"]["schedule"]


def test_kustomization_names_files_that_are_there() -> None:
    """Else `kubectl apply -k` ends before it has made anything."""
    [kustomization] = documents(KUBERNETES / "kustomization.yaml")
    [generated] = kustomization["configMapGenerator"]
    for name in [*kustomization["resources"], *generated["files"]]:
        assert (KUBERNETES / name).is_file()
    [cron] = [document for _, document in manifests() if document["kind"] == "CronJob"]
    [volume] = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == generated["name"]


def test_ray_takes_the_launcher_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else `ray up` ends with a schema error, or starts nodes that cannot train."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = yaml.safe_load((DEPLOY / "aws.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config(config | {"max_workerz": 1}))
    types = config["available_node_types"]
    for name in ("decode", "train"):
        assert types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert types[name]["max_workers"] > types[name]["min_workers"]
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]


def test_compose_takes_its_file() -> None:
    """Else `docker compose up` ends at once."""
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout


def test_dockerfile_is_without_fault() -> None:
    """Else the image grows, runs as root, or differs from build to build."""
    done = tool("hadolint", "--failure-threshold", "style", DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_scripts_are_without_fault() -> None:
    """Else a path with a space, or a command that fails, does in the night what nobody meant."""
    scripts = sorted(DEPLOY.rglob("*.sh"))
    assert len(scripts) >= 3
    done = tool("shellcheck", *scripts)
    assert done.returncode == 0, done.stdout
    assert all(script.stat().st_mode & 0o111 for script in scripts)
