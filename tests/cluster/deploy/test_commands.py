"""The commands in cluster/deploy, each checked against the program that it calls."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.runtime.resources import LOADER_CPUS
from gare.config import Config, load_config
from pipelines.extracting.pools import ACTOR_MEMORY_BYTES
from tests.cluster.deploy.support import (
    DEPLOY,
    IN_IMAGE,
    KUBERNETES,
    Command,
    commands,
    compose,
    crontab_lines,
    documents,
    manifests,
    nodes,
)
from tests.helpers.waiting import wait_until

COMMANDS = commands()
#: Programs of the images that are not ours.
FOREIGN = {"server", "weed"}
STEPS = {"prepare-and-extract.sh": ("prepare", "extract"), "nightly-extract.sh": ("prepare", "extract")}


def pipelines_of(command: Command) -> tuple[tuple[str, ...], list[str]]:
    """The steps that a command runs, and the arguments each of them gets; none where it runs none."""
    words = [word for word in command.words if word not in ("sh", "bash", "python")]
    program = Path(words[0])
    if program.name in STEPS:
        return STEPS[program.name], words[1:]
    if program.parent.name == "pipelines":
        return (program.stem,), words[1:]
    return (), []


def config_of(command: Command, repository: Path) -> Config:
    """The configuration that a pipeline's command means; refuses what the pipeline would refuse."""
    _, arguments = pipelines_of(command)
    assert arguments[0] == "--config"
    assert not [word for word in arguments[2:] if word.startswith("-")], "an option that no test knows"
    return load_config(repository / arguments[1].removeprefix(IN_IMAGE), arguments[2:])


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_one_that_its_program_takes(command: Command, repository: Path) -> None:
    """Else a container starts, prints its usage, and starts again for ever."""
    words = command.words
    steps, _ = pipelines_of(command)
    if steps:
        for step in steps:
            assert (repository / "pipelines" / f"{step}.py").is_file()
        [script] = [word for word in words if word.startswith(IN_IMAGE)][:1]
        assert (repository / script.removeprefix(IN_IMAGE)).is_file()
        config_of(command, repository)
    elif words[0] == "ray":
        from ray.scripts.scripts import cli

        # Parses and converts every option; runs nothing.
        assert cli.commands[words[1]].make_context(" ".join(words[:2]), list(words[2:])).params
    elif words[0] == "mlflow":
        assert words[1] == "server"  # the next test's
    elif words[0] == "ulimit":
        assert words[1:] == ("-n", "65536")
    elif words[:2] == ("sh", "-c"):
        assert "weed shell" in words[2]
    else:
        assert words[0] in FOREIGN or Path(words[1]).parent == Path("/etc/gare")


def test_mlflow_takes_its_commands() -> None:
    """Else the tracking server's container starts, prints its usage, and starts again for ever."""
    servers = [command.words for command in COMMANDS if command.words[0] == "mlflow"]
    assert len(servers) == 2
    # In a process of its own: importing MLflow's command line warns, and changes SQLAlchemy for all others.
    code = "import json, sys; from mlflow.cli import cli\n" + (
        "for words in json.loads(sys.argv[1]): cli.commands[words[1]].make_context('mlflow', words[2:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(servers)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_these_checks_see_every_kind_of_command() -> None:
    """Else a file is renamed, or a key of it, and nothing is checked any more."""
    found = {(command.where.split()[0], pipelines_of(command)[0]) for command in COMMANDS}
    for where, steps in (
        ("rayjob-extract.yaml", ("prepare", "extract")),
        ("raycronjob-extract.yaml", ("prepare", "extract")),
        ("rayjob-train.yaml", ("train",)),
        ("rayjob-evaluate.yaml", ("evaluate",)),
        ("crontab", ("prepare", "extract")),
    ):
        assert (where, steps) in found
    starts = {(command.where, command.words[:2]) for command in COMMANDS}
    for where, words in (
        ("mlflow.yaml", ("mlflow", "server")),
        ("compose.yaml mlflow", ("mlflow", "server")),
        ("compose.yaml ray-head", ("ray", "start")),
        ("aws.yaml head_start_ray_commands", ("ray", "start")),
        ("aws.yaml worker_start_ray_commands", ("ray", "start")),
    ):
        assert (where, words) in starts


def test_both_steps_get_every_argument_and_a_failed_one_ends_the_script(tmp_path: Path) -> None:
    """Else the store is extracted from last night's manifest, or a failed night looks like a good one."""
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\n'
        'case $1 in *prepare*) exit "$PREPARE";; esac\nexit 5\n'
    )
    (tmp_path / "python").chmod(0o755)
    for prepared, status, steps in (("0", 5, ["prepare", "extract"]), ("3", 3, ["prepare"])):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["sh", str(DEPLOY / "prepare-and-extract.sh"), "--config", "a b.yaml"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PREPARE": prepared},
            cwd=tmp_path,
            check=False,
            timeout=60,
        )
        assert done.returncode == status
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls == [f"pipelines/{step}.py --config a b.yaml" for step in steps]


def test_training_gets_what_it_asks_for(repository: Path) -> None:
    """Else the job is refused once its GPUs have been paid for: it asks for more than its cluster has."""
    [job] = documents(KUBERNETES / "rayjob-train.yaml")
    [command] = [command for command in COMMANDS if command.where == "rayjob-train.yaml"]
    cluster = config_of(command, repository).cluster
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    [container] = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert cluster.use_gpu
    assert group["replicas"] * gpus == cluster.train_workers
    assert gpus * (cluster.cpus_per_worker + LOADER_CPUS) <= int(container["resources"]["requests"]["cpu"])


@pytest.mark.parametrize("name", ["raycluster", "rayjob-extract", "rayjob-train"])
def test_ray_counts_what_a_pod_has(name: str) -> None:
    """Else Ray puts more on a pod than it has, and the kernel kills what decodes."""
    [document] = documents(KUBERNETES / f"{name}.yaml")
    groups = [node for node in nodes(document) if "groupName" in node]
    assert groups
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        cpus = int(container["resources"]["requests"]["cpu"])
        assert group["rayStartParams"]["num-cpus"] == str(cpus)
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", "0")
        assert group["rayStartParams"].get("num-gpus", "0") == gpus
        memory = int(re.fullmatch(r"(\d+)Gi", container["resources"]["limits"]["memory"])[1]) * 2**30  # type: ignore[index]
        # Ray keeps 30 % of a node's memory for its object store.
        assert cpus * ACTOR_MEMORY_BYTES < 0.7 * memory
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_versions_in_the_files_are_those_of_this_project(repository: Path) -> None:
    """Else the operator, the image and the code disagree on which Ray they speak."""
    constraints = dict(
        line.split("==") for line in (repository / "constraints.txt").read_text().splitlines() if line
    )
    version = re.search(r'^version = "(.+)"', (repository / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    for _, document in manifests():
        for node in nodes(document):
            if "rayVersion" in node:
                assert node["rayVersion"] == constraints["ray"]
    images = [node["image"] for _, document in manifests() for node in nodes(document) if "image" in node]
    images += [service["image"] for service in compose()["services"].values()]
    images.append(yaml.safe_load((DEPLOY / "aws.yaml").read_text())["docker"]["image"])
    for image in images:
        name, _, tag = image.partition(":")
        assert tag
        assert tag != "latest"
        if name.split("/")[-1] == "gare":
            assert re.fullmatch(rf"{re.escape(version[1])}-(cpu|cuda|\$\{{ACCELERATOR:-cpu\}})", tag)


def test_crontab_is_one_that_cron_takes() -> None:
    """Else cron ignores the line, and no night is extracted."""
    [line] = crontab_lines()
    *times, command = line.split(None, 5)
    assert len(times) == 5
    limits: tuple[Any, ...] = (range(60), range(24), range(1, 32), range(1, 13), range(8))
    for field, allowed in zip(times, limits, strict=True):
        assert field == "*" or int(field) in allowed
    assert "%" not in command, "cron makes a new line of it"
    assert command.startswith(f"{IN_IMAGE}cluster/deploy/nightly-extract.sh ")
    settings = [
        line
        for line in (DEPLOY / "crontab").read_text().splitlines()
        if line and line[0] not in "#*0123456789"
    ]
    assert all(re.fullmatch(r"[A-Z_]+=\S+", setting) for setting in settings)


def test_nightly_job_that_is_ended_early_stops_what_it_submitted(tmp_path: Path) -> None:
    """Else the job goes on unwatched, and the next night starts beside it."""
    # A copy, in a tree without the .venv whose own `ray` the script would prefer.
    nightly = tmp_path / "cluster/deploy/nightly-extract.sh"
    nightly.parent.mkdir(parents=True)
    shutil.copy(DEPLOY / nightly.name, nightly)
    os.mkfifo(tmp_path / "held")
    (tmp_path / "ray").write_text(
        '#!/bin/sh\ncd "$(dirname "$0")"\necho "$*" >> calls\n'
        "case $2 in submit) touch submitted; cat held;; esac\n"
    )
    (tmp_path / "ray").chmod(0o755)
    script = subprocess.Popen(
        [nightly, "--config", "conf/own.yaml"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "submitted").exists, within_s=60, process=script)
    script.terminate()
    _, mail = script.communicate(timeout=60)
    # The client goes on until its pipe ends.
    os.close(os.open(tmp_path / "held", os.O_WRONLY | os.O_NONBLOCK))
    assert script.returncode == 4
    submit, stop = (tmp_path / "calls").read_text().splitlines()
    [job] = re.findall(r"--submission-id (\S+)", submit)
    assert stop == f"job stop --no-wait {job}"
    assert f"{job} was stopped" in mail


@pytest.mark.parametrize(
    ("before", "during", "status", "words"),
    [
        ([], ["Initializing", "unanswered", "Running", "Complete"], 0, "SUCCEEDED"),
        (["Complete"], ["Running", "Complete"], 0, "SUCCEEDED"),
        ([], ["Retrying", "Failed"], 1, "FAILED"),
        ([], ["ValidationFailed"], 1, "FAILED"),
        ([], ["Running", "gone"], 1, "is gone"),
        (["Running"], [], 75, "still at work"),
        (["unanswered", "Initializing"], [], 75, "still at work"),
    ],
)
def test_nightly_rayjob_waits_for_its_end_and_leaves_the_last_night_alone(
    before: list[str], during: list[str], status: int, words: str, tmp_path: Path
) -> None:
    """Else two nights work on one store, or a night that failed is shown as done."""
    (tmp_path / "before").write_text("".join(f"{state}\n" for state in before))
    (tmp_path / "during").write_text("".join(f"{state}\n" for state in during))
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    done = subprocess.run(
        ["sh", str(KUBERNETES / "nightly-rayjob.sh"), str(KUBERNETES / "rayjob-extract.yaml")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "POLL_S": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert words in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum(call.startswith("create -f") for call in calls) == (status != 75)
    assert sum(call.startswith("delete") for call in calls) == (before == ["Complete"])


#: A kubectl of one RayJob whose states are read off a list, the last one staying.
KUBECTL = """#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >> calls
case $* in
  "create --dry-run=client -f "*) printf gare-extract; exit ;;
  "create -f "*) [ ! -s before ] || exit 9; mv during before; touch created; exit ;;
  "delete rayjob gare-extract --wait") : > before; exit ;;
  "get rayjob gare-extract --ignore-not-found -o "*) ;;
  *) exit 9 ;;
esac
state=$(head -n 1 before)
case $*,$state in
  *,unanswered) sed -i 1d before; exit 1 ;;
  *,gone | *,) [ ! -e created ] || [ "$state" ] || printf 'gare-extract '; exit ;;
  *jobDeploymentStatus*) printf 'gare-extract %s' "$state" ;;
  *jobStatus*,Complete) printf 'gare-extract SUCCEEDED'; exit ;;
  *jobStatus*) printf 'gare-extract FAILED'; exit ;;
  *) exit ;;
esac
[ "$(wc -l < before)" = 1 ] || sed -i 1d before
"""
