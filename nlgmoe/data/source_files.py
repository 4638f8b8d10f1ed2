"""The files that text is read from: found by paths, patterns and addresses of fsspec, described, and divided into shards."""

import glob
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fsspec.core import url_to_fs

from nlgmoe.validation import SettingError, require

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN_TEXT = (".txt", ".md")  # one document a file, unless `Fields.text_bytes` is set
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = ", ".join([*JSON_LINES, *PLAIN_TEXT, *(f"{JSON_LINES[0]}{ending}" for ending in COMPRESSIONS), ".parquet"])
WHOLE = range(sys.maxsize)  # numbers of all documents
# Entries of fsspec's `info` that change with a file's contents; each server has some of them.
VERSIONS = ("blob_id", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")


@dataclass(frozen=True)
class DataFile:
    """One file."""

    path: str  # local, or an address such as `hf://datasets/NAME@COMMIT/train/00.jsonl.zst`
    bytes: int  # its size
    modified: float | None = None  # when a local file was written, in seconds; None of others
    # Of an address, what its server says of the version, such as an ETag, or the path on the hub, which holds the commit; of a
    # local file of training, and where a server says nothing, `hash_of_pieces`.
    contents: str = ""


def has_records(path: str | Path) -> bool:
    """Return whether a file is JSON lines or Parquet by its name."""
    return _uncompressed(path).endswith(JSON_LINES) or str(path).endswith(".parquet")


def is_plain_text(path: str | Path) -> bool:
    """Return whether a file is plain text by its name."""
    return _uncompressed(path).endswith(PLAIN_TEXT)


def _uncompressed(path: str | Path) -> str:
    return os.path.splitext(path)[0] if str(path).endswith((*COMPRESSIONS,)) else str(path)


def describe_file(path: str) -> DataFile:
    """Look up size and version of a file, by which changes are detected; the size is 0 where it is missing, or not known."""
    try:
        if is_local(path):
            status = os.stat(path)
            return DataFile(path, status.st_size, status.st_mtime)
        file_system, name = url_to_fs(path)
        info = file_system.info(name)
    except FileNotFoundError:
        return DataFile(path, 0)
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return DataFile(path, int(info.get("size") or 0), contents=version)


def find_addressed(source: str) -> list[str]:
    """Return the files, sorted, that an address of fsspec names: a file, the files of a folder or of a pattern."""
    with suppress(FileNotFoundError):
        file_system, name = url_to_fs(source)
        file_system.invalidate_cache()  # of a listing earlier in this process
        if not glob.has_magic(name) and (has_records(source) or is_plain_text(source)):
            return [source]  # a folder of http is told from a file by reading all of it
        if "::" in source:
            raise SettingError(f"{source}: patterns and folders of chained addresses are not read, only single files")
        files = file_system.glob(name) if glob.has_magic(name) else file_system.ls(name, detail=False)
        return sorted(str(file_system.unstrip_protocol(file)).removeprefix("file://") for file in files)
    return []


def is_local(path: str) -> bool:
    """Return whether a file is named by a path, not by an address."""
    return "://" not in path


def input_files(given: str | Sequence[str]) -> list[str]:
    """Return the input files, sorted within each pattern and folder. Plain text (a README) beside files of records is left out.

    Args:
        given: paths or addresses of fsspec (`s3://bucket/pile`) of files, folders and patterns, `**` for folders at any depth.
    """
    require(bool(given), f"input={given} is empty; give a path, a folder, or a pattern in quotes")
    all_files: list[str] = []
    for source in [given] if isinstance(given, str) else given:
        source = source.removeprefix("file://")
        if not is_local(source):
            files = find_addressed(source)
            is_folder = not glob.has_magic(source) and files != [source]
        else:
            is_folder = Path(source).is_dir()
            files = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
            files = sorted(map(str, Path(source).iterdir())) if is_folder else files
        if is_folder:
            # Hidden files are skipped, as by patterns, and so is the .json of a corpus.
            corpora = {f"{file.removesuffix('.idx')}.json" for file in files if file.endswith(".idx")}
            children = [file for file in files if not os.path.basename(file).startswith(".") and file not in corpora]
            files = [*filter(has_records, children)] or [*filter(is_plain_text, children)]
            if not files:
                patterns = f"for folders inside give patterns, such as '{source}/**/*.jsonl' or '{source}/**/*.txt'"
                problem = f"input={source} is a folder without text files of its own"
                raise SettingError(f"{problem}; known endings are {ENDINGS}; {patterns}")
            if others := [os.path.basename(child) for child in children if child not in files]:
                named = f"{len(others)} entries of {source} are left out, such as {others[0]}"
                reason = "folders, unknown endings, or plain text beside records; to read more, add patterns"
                print(f"note: {named}: {reason}, such as '{source}/**/*.txt'", file=sys.stderr)
        require(bool(files), f"input={source} matches no file; give a path, a folder, or a pattern in quotes")
        all_files += files
    seen: set[str] = set()
    for file in all_files:
        require(has_records(file) or is_plain_text(file), f"input={file} cannot be read; known endings are {ENDINGS}")
        real_path = os.path.realpath(file) if is_local(file) else file  # a file may have several names and links
        require(real_path not in seen, f"input={file} is given more than once; its documents would be repeated")
        seen.add(real_path)
    return all_files


def part_of(files: Sequence[str], shard: str) -> tuple[list[str], str]:
    """Return the files of part I of N, every N-th one, and the suffix of its prefix, `-I-of-N`.

    Args:
        files: all files of the corpus.
        shard: I/N, with I from 1; other processes prepare the other parts.
    """
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SettingError(f"shard={shard} is not I/N with I from 1 to N; give 1/4 to 4/4 for four shards")
    return list(files[int(number) - 1 :: int(count)]), f"-{int(number)}-of-{int(count)}"
