"""Nothing from outside is run as code: no pickles, no YAML tags, no eval; read from the source itself.

That hostile files are refused is shown where they are read: ``tests/train/checkpoint/test_files.py``
(trainer.pt), ``tests/model/importing/test_weights.py`` (CLIP's and released weights) and
``tests/cluster/tracking/test_run.py`` (registry).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for room in ("gare", "cluster", "pipelines") for path in (REPOSITORY / room).rglob("*.py")
)

#: Modules that run code from data.
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"),
    *("pickle5", "ray.cloudpickle", "torch.package"),
}
#: Calls that do, by the end of their dotted name.
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
}
#: What may be there all the same, by file, with its reason.
ALLOWED = {
    # An unpickler that knows tensors and plain containers alone, for OpenAI's archives.
    ("gare/model/importing/weight_files.py", "import pickle"),
    # Its loader is the safe one, without repeated keys.
    ("gare/config/strict_yaml.py", "yaml.load"),
    # A model of code and weights, after it has been looked at.
    ("cluster/tracking/served.py", "mlflow.pyfunc.load_model"),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_constant(call: ast.Call, keyword: str, value: object) -> bool:
    return any(
        given.arg == keyword and isinstance(given.value, ast.Constant) and given.value.value is value
        for given in call.keywords
    )


def findings(text: str) -> Iterator[str]:
    """What in a source file may run code from data."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            whole = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            yield from (f"import {name}" for name in {*modules, *whole} if name in MODULES)
            # By another name a call would not be seen below.
            yield from (
                f"from {module} import {name}"
                for module in modules
                for name in names
                if (module, name)
                in {("torch", "load"), ("yaml", "load"), ("numpy", "load"), ("os", "system")}
            )
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS or name.rpartition(".")[2] == "read_pickle":
                yield name
            elif name == "torch.load" and not is_constant(node, "weights_only", True):
                yield "torch.load without weights_only=True"
            elif name in ("np.load", "numpy.load") and any(
                one.arg == "allow_pickle" for one in node.keywords
            ):
                yield f"{name} with allow_pickle"
            elif name in ("yaml.load", "yaml.load_all") or name.endswith("pyfunc.load_model"):
                yield name
            elif is_constant(node, "shell", True):
                yield f"{name} with a shell"


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "import cloudpickle as c",
            "from ray import cloudpickle",
        ),
        *("torch.load(path)", "torch.load(path, weights_only=False)", "from torch import load", "eval(text)"),
        *("np.load(path, allow_pickle=True)", "yaml.load(text, yaml.Loader)", "yaml.unsafe_load(text)"),
        *("subprocess.run(line, shell=True)", "pandas.read_pickle(path)", "def f():\n import marshal"),
        *("mlflow.pyfunc.load_model(uri)", "torch.hub.load(place, name)"),
    ],
)
def test_the_search_finds_each(line: str) -> None:
    """A search that finds nothing, whatever is there, protects nobody."""
    assert list(findings(line))


def test_nothing_from_outside_is_run_as_code() -> None:
    """Checkpoints, stores and models are passed on; opening one must not hand over the machine."""
    assert len(SOURCES) > 100
    found = {
        (str(path.relative_to(REPOSITORY)), one) for path in SOURCES for one in findings(path.read_text())
    }
    assert found - ALLOWED == set()
    assert ALLOWED - found == set(), "an exception that is no longer needed"


def test_the_exceptions_are_what_they_say() -> None:
    """An exception by name would let anything through that takes its place."""
    weights = (REPOSITORY / "gare/model/importing/weight_files.py").read_text()
    assert set(_attributes_of(weights, "pickle")) == {"Unpickler", "UnpicklingError"}
    import yaml

    from gare.config import strict_yaml

    assert issubclass(strict_yaml._Loader, yaml.SafeLoader)
    for text in ("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "a: !!python/tuple [1]"):
        with pytest.raises(yaml.YAMLError):
            strict_yaml.load_yaml(text)


def _attributes_of(text: str, module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            yield node.attr
