"""The files that text is read from: kinds by their names, addresses of fsspec, sizes and versions."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

from fsspec.core import url_to_fs

from nlgmoe.validation import SettingError

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN_TEXT = (".txt", ".md")  # one document a file, unless `Fields.text_bytes` is set
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Entries of fsspec's `info` that change with a file's contents; each server has some of them.
VERSIONS = ("blob_id", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")


@dataclass(frozen=True)
class DataFile:
    """One file.

    Args:
        path: local, or an address such as `hf://datasets/NAME@COMMIT/train/00.jsonl.zst`.
        bytes: its size.
        modified: when a local file was written, in seconds; None of others.
        contents: of an address, what its server says of the version, such as an ETag, or the path on the hub, which holds the
            commit; of a local file of training, and where a server says nothing, `hash_of_pieces`.
    """

    path: str
    bytes: int
    modified: float | None = None
    contents: str = ""


def has_records(path: str | Path) -> bool:
    """Return whether a file is JSON lines or Parquet by its name."""
    return _uncompressed(path).endswith(JSON_LINES) or str(path).endswith(".parquet")


def is_plain_text(path: str | Path) -> bool:
    """Return whether a file is plain text by its name."""
    return _uncompressed(path).endswith(PLAIN_TEXT)


def _uncompressed(path: str | Path) -> str:
    name = str(path)
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return name


def describe_file(path: str) -> DataFile:
    """Look up size and version of a file, by which changes are detected; the size is 0 where it is missing, or not known."""
    try:
        if is_local(path):
            status = os.stat(path)
            return DataFile(path, status.st_size, status.st_mtime)
        with _named_errors(path):
            file_system, name = url_to_fs(path)
            info = file_system.info(name)
    except FileNotFoundError:
        return DataFile(path, 0)
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return DataFile(path, int(info.get("size") or 0), contents=version)


def find_addressed(source: str) -> list[str]:
    """Return the files, sorted, that an address of fsspec names: a file, the files of a folder or of a pattern.

    Raises:
        SettingError: fsspec or the server refuses it.
    """
    with _named_errors(source), suppress(FileNotFoundError):
        file_system, name = url_to_fs(source)
        file_system.invalidate_cache()  # of a listing earlier in this process
        if not has_magic(name) and (has_records(source) or is_plain_text(source)):
            return [source]  # a folder of http is told from a file by reading all of it
        if "::" in source:
            raise ValueError("patterns and folders of chained addresses are not read, only single files")
        found = file_system.glob(name) if has_magic(name) else file_system.ls(name, detail=False)
        return sorted(str(file_system.unstrip_protocol(file)) for file in found)
    return []


def is_local(path: str) -> bool:
    """Return whether a file is named by a path, not by an address."""
    return "://" not in path


@contextmanager
def _named_errors(source: str) -> Iterator[None]:
    """Raise any error of a file system with the name of what it was to read: each has errors of its own library."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(
            f"{source} cannot be read here ({reason}); give paths, or addresses such as s3://bucket/pile/*.jsonl.zst, install "
            "the package that fsspec needs for them, and set what it needs to log in"
        ) from error
