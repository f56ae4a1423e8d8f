"""Locations: local paths and URIs such as s3://bucket/key, opened with pyarrow.fs alone.

A location without ``scheme://`` is a local path and is taken literally: spaces, '#', '%' and '@' are
ordinary characters there. In a URI they are percent-encoded, which ``join`` and ``list_files`` take care of.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import urllib.parse
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from gare.errors import DataError, FullDiskError, without_secrets
from gare.storage.object_store import open_s3
from gare.storage.uninterrupted import run_uninterrupted
from gare.storage.uris import is_uri, scheme_of

ACCEPTED = "a local path, file:///… or an object store's URI such as s3://bucket/key"

_TEMPORARY = ".gare-"
#: Times that an object is read if it is not JSON, since it may have been replaced meanwhile.
_JSON_READS = 3
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def open_fs(uri: str) -> tuple[pafs.FileSystem, str]:
    """Opens the file system of a location.

    Args:
        uri: a local path (absolute, relative to the working directory or below ``~``) or a URI.

    Returns:
        The file system and the path inside it; local paths come back absolute.

    S3 is reached as described in ``gare.storage.object_store``.

    Raises:
        DataError: for an empty location or a URI that pyarrow cannot open.
    """
    if not uri or "\0" in uri:
        raise DataError(f"{uri!r} is not a location", accepted=ACCEPTED)
    if not is_uri(uri):
        return pafs.LocalFileSystem(), _absolute(uri)
    with _faults_of(uri, "cannot be opened"):
        if scheme_of(uri) == "s3":
            return open_s3(uri)
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path


def join(uri: str, *names: str) -> str:
    """Appends single names to a location.

    Raises:
        DataError: for a name that is empty, '.', '..' or holds a separator or NUL, so that a name read
            from data never leads out of the folder.
    """
    for name in names:
        if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
            raise DataError(
                f"{name!r} is not the name of a file or folder", where=uri, accepted="no separator, not '..'"
            )
    return _append(uri, "/".join(names)) if names else uri


def exists(uri: str) -> bool:
    """Returns True if a file or folder is there.

    Raises:
        DataError: if that cannot be found out.
    """
    filesystem, path = open_fs(uri)
    with _faults_of(uri, "cannot be looked up"):
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """Returns the content of a file as it is stored: a .gz file stays compressed.

    Raises:
        DataError: if the file is missing or cannot be read.
    """
    filesystem, path = open_fs(uri)
    with _faults_of(uri, "cannot be read"), filesystem.open_input_file(path) as stream:
        return bytes(stream.read())


def write_atomically(uri: str, data: bytes | memoryview, *, private: bool = False) -> None:
    """Writes a file that appears whole or not at all; creates its folder, replaces an older file.

    Locally a temporary file beside it is synced to disk and renamed; an object store shows an object once it
    is uploaded completely. An interrupt at any moment leaves the older file or the whole new one; it is
    raised once the writing has ended.

    Args:
        uri: the file.
        data: its content.
        private: let nobody but the user read a local file; others read it as the umask has it.

    Raises:
        DataError: if it cannot be written (FullDiskError for lack of space); an older file is then unchanged.
    """
    filesystem, path = open_fs(uri)
    with _faults_of(uri, "cannot be written"):
        if isinstance(filesystem, pafs.LocalFileSystem):
            run_uninterrupted(
                partial(_replace_local, Path(path), data, private), f"writing {without_secrets(uri)}"
            )
        else:
            run_uninterrupted(partial(_put_object, filesystem, path, data), f"writing {without_secrets(uri)}")


def list_files(uri: str, suffix: str = "", *, recursive: bool = False) -> list[str]:
    """Returns the locations of the files in a folder, sorted.

    Args:
        uri: the folder; one that is missing has no files.
        suffix: only names with this ending.
        recursive: also the files of its subfolders.

    Raises:
        DataError: if the folder cannot be listed.
    """
    filesystem, path = open_fs(uri)
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
    with _faults_of(uri, "cannot be listed"):
        infos = filesystem.get_file_info(selector)
    prefix = path.rstrip("/") + "/"
    return sorted(
        _append(uri, info.path.removeprefix(prefix))
        for info in infos
        if info.type == pafs.FileType.File
        and info.base_name.endswith(suffix)
        and not _is_temporary(info.base_name)
    )


def delete_file(uri: str) -> None:
    """Deletes a file; does nothing if there is none.

    Raises:
        DataError: if it cannot be deleted.
    """
    filesystem, path = open_fs(uri)
    with _faults_of(uri, "cannot be deleted"), contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(path)


def delete_leftovers(uri: str, before_ns: int) -> int:
    """Deletes temporary files that killed writers have left below a local folder.

    An object store has none to list: partial uploads are not visible.

    Args:
        uri: the folder; one that is missing holds nothing.
        before_ns: nanoseconds; files last changed at this time or later are kept, since a job may be writing
            them.

    Returns:
        The number of files that were deleted.

    Raises:
        DataError: if the folder cannot be listed or a file cannot be deleted.
    """
    filesystem, path = open_fs(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return 0
    deleted = 0
    with _faults_of(uri, "cannot be cleared of temporary files"):
        for info in filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True)):
            is_old = info.mtime_ns is not None and info.mtime_ns < before_ns
            if info.type == pafs.FileType.File and _is_temporary(info.base_name) and is_old:
                Path(info.path).unlink(missing_ok=True)
                deleted += 1
    return deleted


def stat_file(uri: str) -> tuple[int, int] | None:
    """Returns size in bytes and time of the last change (ns, the storage's clock); None if there is no file.

    Raises:
        DataError: if that cannot be found out.
    """
    filesystem, path = open_fs(uri)
    with _faults_of(uri, "cannot be looked up"):
        info = filesystem.get_file_info(path)
    return (info.size or 0, info.mtime_ns or 0) if info.type == pafs.FileType.File else None


def delete_tree(uri: str) -> None:
    """Deletes a folder and all in it; does nothing if there is none.

    Raises:
        DataError: for the root of a file system, a bucket or the home folder, for what is not a folder,
            and if something cannot be deleted.
    """
    filesystem, path = open_fs(uri)
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    depth = len([part for part in path.split("/") if part])
    if depth < (1 if is_local else 2) or (is_local and Path(path).resolve() in (_home(), Path("/"))):
        raise DataError("is not deleted: it is a whole file system, bucket or home", where=uri)
    if is_local and Path(path).is_symlink():
        raise DataError("is not deleted: it is a link", where=uri, accepted="the folder that it points to")
    with _faults_of(uri, "cannot be deleted"):
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)


def _home() -> Path:
    """Returns the home folder; ``~`` itself if there is none."""
    return Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.home raises without one)


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:  # ~name of an unknown user
        raise DataError(f"has no home folder: {error}", where=path, accepted=ACCEPTED) from error


def _append(uri: str, relative: str) -> str:
    if not is_uri(uri):
        return f"{uri.rstrip('/')}/{relative}"
    # A URI's query (s3://bucket/key?region=…) has to stay behind the path.
    base, mark, query = uri.partition("?")
    return f"{base.rstrip('/')}/{urllib.parse.quote(relative, safe='/')}{mark}{query}"


def _is_temporary(name: str) -> bool:
    return name.startswith(_TEMPORARY) and name.endswith(".tmp")


def _put_object(filesystem: pafs.FileSystem, path: str, data: bytes | memoryview) -> None:
    """Uploads an object; must not be interrupted, since a stream that is dropped completes its upload."""
    # compression=None: by default pyarrow compresses again what is named .gz.
    stream = filesystem.open_output_stream(path, compression=None)
    stream.write(data)
    stream.close()


def _replace_local(path: Path, data: bytes | memoryview, private: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}.tmp"
    try:
        # Not tempfile: its files are readable by their owner alone, and stores are shared.
        mode = 0o600 if private else 0o666
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is durable only once the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _faults_of(uri: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, ValueError) as error:
        kind = FullDiskError if getattr(error, "errno", None) in _NO_ROOM else DataError
        raise kind(
            f"{what}: {_reason(error)}", where=without_secrets(uri), accepted=_next_step(error)
        ) from error


def _reason(error: Exception) -> str:
    # pyarrow's own words repeat the path and the call.
    for kind, number in ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES)):
        if isinstance(error, kind):
            return os.strerror(number)
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error).strip()


def _next_step(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "a location that exists"
    if isinstance(error, PermissionError):
        return "a location that you may read and write"
    if getattr(error, "errno", None) in _NO_ROOM:
        return "make room there, then run the same command again: it continues where this one stopped"
    return "" if isinstance(error, OSError) else ACCEPTED


def write_json(uri: str, content: object) -> None:
    """Writes JSON that appears whole or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    write_atomically(uri, json_bytes(content))


def json_bytes(content: object) -> bytes:
    """Returns JSON as ``write_json`` writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode()


def json_sha256(content: object) -> str:
    """Returns the SHA-256 of content as JSON with sorted keys; what JSON does not have counts as its text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read_json(uri: str) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: if it cannot be read or is not JSON.
    """
    return read_json_and_bytes(uri)[0]


def read_json_and_bytes(uri: str) -> tuple[Any, bytes]:
    """Reads a JSON file; returns its content and the bytes that it was read from.

    The size of an object is asked before it is read. If a longer object replaces it in between, the text is
    cut off, is not JSON, and is read again.

    Raises:
        DataError: if it cannot be read or is not JSON.
    """
    for attempt in range(_JSON_READS):
        data = read_bytes(uri)
        try:
            return json.loads(data), data
        except ValueError as error:
            if attempt == _JSON_READS - 1 or isinstance(open_fs(uri)[0], pafs.LocalFileSystem):
                raise DataError(f"is not JSON: {error}", where=uri) from error
    raise AssertionError


def copy_files(source: str, target: str) -> None:
    """Copies the files of a folder, not of its subfolders, each whole or not at all.

    Raises:
        DataError: if one cannot be read or written.
    """
    for file in list_files(source):
        name = urllib.parse.unquote(file.partition("?")[0]) if is_uri(file) else file
        write_atomically(join(target, name.rsplit("/", 1)[-1]), read_bytes(file))
