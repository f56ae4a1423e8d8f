"""Reading of tensors from third-party files, without ever running code from a file.

Accepted: a state dict from ``torch.save``, a TorchScript archive (OpenAI's CLIP), safetensors, and a folder
that Hugging Face's ``save_pretrained`` wrote. Pickles are read for tensors and plain containers only.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gare.errors import CheckpointError

ACCEPTED = "a state dict (.pt), a TorchScript archive (.pt), .safetensors, or a Hugging Face CLIP folder"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a file by name, on the CPU, in the file's own precision.

    Raises:
        CheckpointError: for a file that is missing, truncated, of another kind, or holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError("there is no such file", where=str(path), accepted=ACCEPTED)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        if _is_torchscript(path):
            return _read_torchscript(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file's faults are reported below, once
            return _state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except CheckpointError:
        raise
    except Exception as error:  # each format has its own exceptions for a damaged file
        raise CheckpointError(_reason(error), where=str(path), accepted=ACCEPTED) from error


def _reason(error: Exception) -> str:
    """Says why a file does not load; PyTorch's own message advises to load it as code."""
    text = str(error)
    if match := re.search(r"(?:GLOBAL |Unsupported class |it names )([\w.]+)", text):
        return f"holds more than tensors: it names {match[1]}"
    if "Unsupported operand" in text or "Unsupported class" in text:
        return "is a pickle that torch.save did not write, which may hold more than tensors"
    first = text.split("\n")[0]
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in first or not first:
        return "is truncated, damaged, or no file of tensors"
    return f"is truncated or damaged: {first}"


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    """Returns the tensors of a loaded object; training codes wrap them in ``state_dict`` or ``model``."""
    if isinstance(loaded, Mapping):
        for wrapper in ("state_dict", "model"):
            if isinstance(loaded.get(wrapper), Mapping):
                loaded = loaded[wrapper]
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise ValueError(f"holds no named tensors but a {type(loaded).__name__}")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """Reads parameters and buffers of a TorchScript module; its code is not read."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix(
            "data.pkl"
        )
        module = _TensorUnpickler(archive, root).load()
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors)
    if not tensors:
        raise ValueError("the archive holds no tensors")
    return tensors


class _ScriptModule:
    """Stand-in for any TorchScript class: a bag of attributes."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


def _collect(module: _ScriptModule, prefix: str, into: dict[str, Tensor]) -> None:
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            into[prefix + name] = value
        elif isinstance(value, _ScriptModule):
            _collect(value, f"{prefix}{name}.", into)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles TorchScript's data.pkl: tensors, plain containers and bags of attributes, nothing else."""

    #: dtypes by the names that storages have in a pickle.
    _STORAGES: ClassVar[dict[str, torch.dtype]] = {
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "DoubleStorage": torch.float64,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "BoolStorage": torch.bool,
    }

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive = archive
        self._root = root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _ScriptModule
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return _REBUILD[name]
        if module == "torch" and name in self._STORAGES:
            return self._STORAGES[name]
        if module == "torch.jit._pickle":
            return _plain
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, saved_id: Any) -> Tensor:
        kind, dtype, key, _, count = saved_id
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it names an object of kind {kind!r}")
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._storages[key] = (
                torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0)
            )
        return self._storages[key]


def _plain(value: Any, *_: Any) -> Any:
    return value


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)


_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _plain,
}
