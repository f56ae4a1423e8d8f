"""Places of each step's outputs: one folder for a data set, below ``storage.root``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gare.config import Config
from gare.config.home import absolute_path

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Layout:
    """Locations of a data set's outputs, as local paths or URIs.

    Attributes:
        root: absolute ``storage.root``.
        data: folder of the data set, root/name.
    """

    root: str
    data: str

    @property
    def is_local(self) -> bool:
        """True if the root is a folder of this machine or a mounted one."""
        return not _SCHEME.match(self.root)

    @property
    def videos(self) -> str:
        """Folder of generated videos."""
        return f"{self.data}/videos"

    @property
    def manifest(self) -> str:
        """The manifest, which prepare writes."""
        return f"{self.data}/manifest.parquet"

    @property
    def frames(self) -> str:
        """The frame store, which extract writes."""
        return f"{self.data}/frames"

    @property
    def features(self) -> str:
        """The feature store, which extract writes."""
        return f"{self.data}/features"

    def run(self, name: str) -> str:
        """Folder of a training run."""
        return f"{self.data}/runs/{name}"

    def checkpoint(self, run: str) -> str:
        """The run's checkpoint that is best on val."""
        return f"{self.run(run)}/best"

    def evaluation(self, run: str, split: str) -> str:
        """Folder of an evaluation."""
        return f"{self.run(run)}/evaluation-{split}"

    def test_curve(self, run: str) -> str:
        """Folder of a run's checkpoints scored on test; these scores are never used to select or compare."""
        return f"{self.run(run)}/evaluation-test-curve"

    def step(self, name: str) -> str:
        """Folder of a step's result if the step has no other folder."""
        return f"{self.data}/{name}"


def layout(config: Config) -> Layout:
    """Returns the locations for a configuration."""
    root = absolute(config.storage.root.rstrip("/") or "/")
    return Layout(root, f"{root.rstrip('/')}/{config.name}")


def absolute(location: str) -> str:
    """Makes a path absolute, since workers may run in another folder; keeps URIs and the empty string.

    Raises:
        ConfigError: for a path below a home folder that is not known.
    """
    if not location or _SCHEME.match(location):
        return location
    return absolute_path(location)
