"""The rules of the house: which room may know of which, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gare

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("gare", "cluster", "pipelines")
#: What a room inside gare may import of gare, beside itself. ``train`` validates with ``retrieval``'s metrics
#: and scores; ``retrieval`` knows nothing of training.
INSIDE_GARE = {
    "errors": set(),
    "tensor_group": set(),
    "config": {"errors"},
    "storage": {"errors"},
    "data": {"config", "errors", "storage", "tensor_group"},
    "model": {"config", "errors", "tensor_group"},
    "extract": {"config", "errors", "storage", "tensor_group", "data", "model"},
    "retrieval": {"config", "errors", "storage", "tensor_group", "data", "model"},
    "report": {"config", "errors", "storage", "tensor_group", "data", "model", "retrieval"},
    "train": {"config", "errors", "storage", "tensor_group", "data", "model", "retrieval", "report"},
    "study": {"config", "errors", "storage", "retrieval", "report"},
}
#: The same for the rooms inside a room: what each may import of those beside it.
INSIDE_ROOMS = {
    "gare/data": {
        "decode": {"images"},
        "store": {"images", "manifest"},
        "benchmarks": {"manifest", "collected_errors"},
        "synthetic": set(),
    },
    "gare/model": {
        "encoders": {"features"},
        "factorized": {"features", "increment"},
        "fused": {"factorized", "products"},
        "importing": {"gare"},
    },
    "gare/train": {
        "optim": set(),
        "loss": {"stages"},
        "checkpoint": {"step"},
        "input": {"checkpoint", "validation"},
    },
    "gare/retrieval": {"ranking": set(), "results": {"ranking", "gallery"}},
    "cluster": {
        "sources": set(),
        "status": set(),
        "runtime": {"logs"},
        "tracking": {"logs", "runtime"},
    },
    "pipelines": {
        "extracting": set(),
        "training": {"stored_outbox"},
        "evaluating": {"training", "stored_outbox", "locks"},
    },
}
TOP_LEVEL = {
    *("README.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt"),
    *("CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md", "mkdocs.yml"),
    *("conf", "docs", "pipelines", "gare", "cluster", "tests"),
}
#: The one importer of boto3.
S3_CLIENT = "gare.storage.s3_client"

SOURCES = sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules that a file imports anywhere, also in functions, for type checkers, or by name.

    ``from a import b`` counts as ``a.b``, which is the module where b is one; a name that gare itself
    hands on counts as its home.
    """
    return frozenset(_imports(ast.parse(path.read_text(encoding="utf-8")), path))


def _imports(tree: ast.AST, path: Path) -> Iterator[str]:
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield (
                    f"{gare._HOMES[alias.name]}.{alias.name}"
                    if source == "gare" and (alias.name in gare._HOMES)
                    else name
                )
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value)


def sources_of(room: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(REPOSITORY).parts[0] == room]


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f():\n    from gare.storage import files", "gare.storage.files"),
        ("from ..data.store.contents import Store", "gare.data.store.contents.Store"),
        ("from . import scorer", "gare.model.scorer"),
        ("import importlib\nimportlib.import_module('ray')", "ray"),
        ("from gare import load_checkpoint", "gare.train.checkpoint.files.load_checkpoint"),
        ("if TYPE_CHECKING:\n    import mlflow.entities", "mlflow.entities"),
    ],
)
def test_no_import_escapes_these_rules(code: str, expected: str) -> None:
    """A rule that overlooks a lazy or relative import holds nothing."""
    assert expected in set(_imports(ast.parse(code), REPOSITORY / "gare" / "model" / "example.py"))


def test_gare_knows_no_machines() -> None:
    """Else the model could not be used without Ray, MLflow or S3 in a notebook or another project.

    Storage on S3 needs boto3 for conditional writes, and imports it when it makes its first one.
    """
    for path in sources_of("gare"):
        assert not tops(path) & {"ray", "mlflow", "cluster", "pipelines", "tests"}, path
        assert "boto3" not in tops(path) or path.name == "s3_client.py", path


def test_boto3_is_imported_when_it_is_needed() -> None:
    """Else a decoder or a notebook that works on local files would wait for it, or fail without it."""
    tree = ast.parse((REPOSITORY / "gare" / "storage" / "s3_client.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [name for node in top for alias in node.names if "boto" in (name := alias.name)]


def test_cluster_knows_configuration_and_errors_alone() -> None:
    """Beside the one way to S3. Else a change of the model could break how runs are started and tracked."""
    for path in sources_of("cluster"):
        assert not tops(path) & {"pipelines", "tests"}, path
        for name in imports(path):
            if name.split(".")[0] == "gare":
                is_allowed = name.split(".")[1] in ("config", "errors") or name.startswith(S3_CLIENT)
                assert is_allowed, f"{path} imports {name}"


def test_pipelines_import_no_pipeline() -> None:
    """Else one step could not be changed or run without the others; the demo and studies compose them.

    What has no entry point is no step but a piece of one.
    """
    steps = {
        module_name(path) for path in sources_of("pipelines") if "\n    main(run" in path.read_text("utf-8")
    }
    assert "pipelines.extract" in steps
    for path in sources_of("pipelines"):
        if path.name not in ("demo.py", "study.py"):
            assert not {".".join(name.split(".")[:2]) for name in imports(path)} & steps, path
        assert "tests" not in tops(path), path


@pytest.mark.parametrize("room", sorted(INSIDE_GARE))
def test_arrows_inside_gare_are_one_way(room: str) -> None:
    """Else the model could not be read, tested or shipped without data loading and training."""
    files = [
        path
        for path in sources_of("gare")
        if path.relative_to(REPOSITORY / "gare").parts[0] in (room, f"{room}.py")
    ]
    assert files
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "gare" and len(parts) > 1 and parts[1] in INSIDE_GARE:
                assert parts[1] in INSIDE_GARE[room] | {room}, f"{path} imports {name}"


def test_every_room_inside_gare_has_a_rule() -> None:
    """A new room without a rule would be free to import anything."""
    found = {
        path.relative_to(REPOSITORY / "gare").parts[0].removesuffix(".py") for path in sources_of("gare")
    }
    assert found - {"__init__"} == set(INSIDE_GARE)


@pytest.mark.parametrize(
    ("house", "room"), [(house, room) for house, rooms in INSIDE_ROOMS.items() for room in rooms]
)
def test_arrows_inside_rooms_are_one_way(house: str, room: str) -> None:
    """Else a decoder could not be changed without the stores, or the loss without its inputs."""
    around = house.replace("/", ".")
    paths = sorted((REPOSITORY / house / room).rglob("*.py"))
    assert paths
    for path in paths:
        for name in imports(path):
            if name.startswith(f"{around}."):
                beside = name.removeprefix(f"{around}.").split(".")[0]
                assert beside in INSIDE_ROOMS[house][room] | {room}, f"{path} imports {name}"


def test_every_room_inside_a_room_has_a_rule() -> None:
    """A new folder without a rule would be free to import anything."""
    for house, rooms in INSIDE_ROOMS.items():
        found = {path.parent.name for path in (REPOSITORY / house).glob("*/__init__.py")}
        assert found == set(rooms), house


def test_the_model_can_be_read_from_the_ground_up() -> None:
    """Else the score could not be understood, or given another path, without the encoders around it."""
    room = REPOSITORY / "gare" / "model"
    files = {module_name(path): path for path in room.rglob("*.py") if path.name != "__init__.py"}
    arrows = {
        name: {other for other in files if any(f"{one}.".startswith(f"{other}.") for one in imports(path))}
        for name, path in files.items()
    }
    assert {"gare.model.scorer", "gare.model.streaming"} <= arrows["gare.model.gare"]
    assert "gare.model.scorer" in arrows["gare.model.streaming"]
    while ground := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in ground}
    assert not arrows, "these import each other"


def test_blocks_of_pairs_are_computed_in_one_place() -> None:
    """A path that is faster or more exact would else be taken for scores, and forgotten for losses."""
    forms = {f"gare.model.factorized.pairs.{name}" for name in ("pair_numbers", "video_pairs", "text_pairs")}
    importers = [module_name(path) for path in SOURCES if imports(path) & forms]
    assert importers == ["gare.model.scorer"]


@pytest.mark.parametrize("library", ["decord", "mlflow", "boto3", "cv2"])
def test_one_importer_each(library: str) -> None:
    """Libraries that change under us, or that may be missing, must have one place to be mended."""
    assert len([path for path in SOURCES if library in tops(path)]) <= 1


def test_importing_gare_is_light(repository: Path) -> None:
    """Else ``import gare`` in a notebook or a decoding process would cost seconds and much memory."""
    heavy = [
        "ray",
        "mlflow",
        "transformers",
        "torch",
        "boto3",
        "decord",
        "av",
        "cv2",
        "matplotlib",
        "pyarrow",
    ]
    code = f"import sys, gare; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_top_level_is_what_the_architecture_lists(repository: Path) -> None:
    """A newcomer finds each thing in the one room that the architecture names for it."""
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the project cannot be told from what lies here")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {name.split("/")[0] for name in listed.stdout.split("\0") if name}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
