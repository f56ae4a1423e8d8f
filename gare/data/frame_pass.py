"""The pass that brings a frame store up to the files of its collection."""

from __future__ import annotations

import pyarrow as pa

from gare.config import Config
from gare.data.collection import Comparison, compare
from gare.data.manifest import Manifest
from gare.data.store import frame_schema, frame_settings
from gare.data.store_pass import Stat, StorePass


class FramePass(StorePass):
    """A frame store that is to hold a manifest's clips.

    Args:
        config: of the run.
        manifest: what the store should hold.
        uri: the store.
        stat: says of uris which files there are now.
        code_version: of this package.

    Raises:
        DataError: for a store that was made with other settings, naming each that differs.
    """

    kind = "frames"

    def __init__(self, config: Config, manifest: Manifest, uri: str, stat: Stat, code_version: str) -> None:
        super().__init__(config, manifest, uri, frame_settings(config.extract), code_version)
        self._stat = stat

    @property
    def schema(self) -> pa.Schema:
        """Columns of the store's data parts."""
        return frame_schema(self.config.extract)

    @property
    def decodes(self) -> bool:
        """True: it is made of video files."""
        return True

    def look(self) -> Comparison:
        """The store beside the files as both are now."""
        versions = self._stat([row.uri for row in self.manifest.rows])
        extract = self.config.extract
        return compare(
            self.uri,
            self.manifest.rows,
            versions,
            retry_failed=extract.retry_failed,
            max_attempts=extract.max_attempts,
            again=self.again,
        )
