"""Files that hold presigned links: whoever reads one may read the videos until the links expire."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gare.data.manifest import Manifest, ManifestRow, read_manifest, write_manifest


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    """The umask of a machine on which people share their files."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    ("uri", "mode"),
    [
        ("https://host/a.mp4?X-Amz-Signature=abc", 0o600),
        ("http://host/a.mp4?sv=1", 0o600),
        ("https://host/a.mp4", 0o644),
        ("/data/what?.mp4", 0o644),
    ],
)
def test_a_manifest_with_signed_links_is_its_owners_alone(uri: str, mode: int, tmp_path: Path) -> None:
    """A shared machine's other users could read the videos of a manifest of 0644."""
    path = tmp_path / "manifest.parquet"
    path.write_bytes(b"an older one")
    path.chmod(0o644)
    row = ManifestRow("a", uri, None, None, "train", ("a caption",))
    write_manifest(Manifest((row,), "folder", "own"), str(path))
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert read_manifest(str(path)).rows == (row,)
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.parquet"]
