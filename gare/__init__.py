"""GARE: text-video retrieval with learned, pair-specific increments.

Importing this package is light: torch, transformers and the rest load with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gare.config import Config, load_config
    from gare.errors import CheckpointError, ConfigError, DataError, GareError
    from gare.model.encoders.tokenizer import tokenize
    from gare.model.features import TextFeatures, VideoFeatures
    from gare.model.gare import GARE
    from gare.model.importing.weights import import_clip, import_released
    from gare.retrieval.ranking.metrics import retrieval_metrics
    from gare.train.checkpoint.files import load_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "GARE": "gare.model.gare",
    "CheckpointError": "gare.errors",
    "Config": "gare.config",
    "ConfigError": "gare.errors",
    "DataError": "gare.errors",
    "GareError": "gare.errors",
    "TextFeatures": "gare.model.features",
    "VideoFeatures": "gare.model.features",
    "import_clip": "gare.model.importing.weights",
    "import_released": "gare.model.importing.weights",
    "load_checkpoint": "gare.train.checkpoint.files",
    "load_config": "gare.config",
    "retrieval_metrics": "gare.retrieval.ranking.metrics",
    "tokenize": "gare.model.encoders.tokenizer",
}

__all__ = [
    "GARE",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "GareError",
    "TextFeatures",
    "VideoFeatures",
    "import_clip",
    "import_released",
    "load_checkpoint",
    "load_config",
    "retrieval_metrics",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gare' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
