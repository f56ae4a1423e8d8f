"""The files of cluster/deploy as the tests read them: documents, their schemas, the commands they hold."""

from __future__ import annotations

import gzip
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[3] / "cluster" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
#: The repository's place in the image.
IN_IMAGE = "/opt/gare/"


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifests() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every Kubernetes object, with its file."""
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in documents(path):
            if document["kind"] != "Kustomization":
                yield path, document


@cache
def operator_schema(shared: Path, kind: str) -> dict[str, Any]:
    """Version v1 of a kind of the Ray operator, with all that the API server would drop made a fault."""
    packed = (shared / "schemas" / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes()
    # The pure Python loader takes ten times as long.
    definition = yaml.load(gzip.decompress(packed), Loader=yaml.CSafeLoader)
    [version] = [entry for entry in definition["spec"]["versions"] if entry["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    # The API server knows it by itself, whatever the definition says.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes in which an unknown field is a fault, not dropped in silence."""
    result = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        result["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = strict(schema[key])
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not open_ended:
        result["additionalProperties"] = False
    return result


@dataclass(frozen=True)
class Command:
    """A command that one of the files has: where, and its words."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)[:60]}"


def commands() -> list[Command]:
    """Every command of this project, of Ray and of MLflow in the files, whatever holds it."""
    return [
        *_kubernetes_commands(),
        *_compose_commands(),
        *_launcher_commands(),
        *(Command("crontab", tuple(shlex.split(line)[5:])) for line in crontab_lines()),
    ]


def crontab_lines() -> list[str]:
    """The jobs of the crontab, without comments and settings."""
    lines = (DEPLOY / "crontab").read_text().splitlines()
    return [line for line in lines if line and line[0] in "*0123456789"]


def _kubernetes_commands() -> Iterator[Command]:
    for path, document in manifests():
        for node in nodes(document):
            if "entrypoint" in node:
                yield Command(path.name, tuple(shlex.split(node["entrypoint"])))
            if "containers" in node:
                for container in node["containers"]:
                    words = [*container.get("command", []), *container.get("args", [])]
                    if words:
                        yield Command(path.name, tuple(words))


def _compose_commands() -> Iterator[Command]:
    for name, service in compose()["services"].items():
        if words := [*service.get("entrypoint", []), *service.get("command", [])]:
            yield Command(f"compose.yaml {name}", tuple(words))


def _launcher_commands() -> Iterator[Command]:
    launcher = yaml.safe_load((DEPLOY / "aws.yaml").read_text())
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for line in launcher[key]:
            for part in line.split(";"):
                yield Command(f"aws.yaml {key}", tuple(shlex.split(part)))


def compose() -> dict[str, Any]:
    [document] = documents(DEPLOY / "compose.yaml")
    return document


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree, itself included."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from nodes(value)


def compact(error: Any) -> str:
    """A fault of a schema on one line."""
    where = "/".join(map(str, error.absolute_path))
    return f"{where}: {error.message[:200]} in {json.dumps(error.instance)[:80]}"
