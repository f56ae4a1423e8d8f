"""The configuration: YAML files and command-line overrides to one checked, frozen object."""

from __future__ import annotations

from gare.config.augment import AugmentConfig
from gare.config.cluster import ClusterConfig, ResolvedCluster
from gare.config.data import DataConfig
from gare.config.evaluate import EvaluateConfig
from gare.config.extract import ExtractConfig
from gare.config.features import FeaturesConfig
from gare.config.loading import Config, describe_keys, differences, load_config, parse_config
from gare.config.model import ClipConfig, ModelConfig
from gare.config.section import DemoConfig, Section, StorageConfig, TrackingConfig
from gare.config.sources import SourcesConfig
from gare.config.study import StudyConfig
from gare.config.train import LossConfig, TrainConfig
from gare.config.upkeep import UpkeepConfig

__all__ = [
    "AugmentConfig",
    "ClipConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "FeaturesConfig",
    "LossConfig",
    "ModelConfig",
    "ResolvedCluster",
    "Section",
    "SourcesConfig",
    "StorageConfig",
    "StudyConfig",
    "TrackingConfig",
    "TrainConfig",
    "UpkeepConfig",
    "describe_keys",
    "differences",
    "load_config",
    "parse_config",
]
