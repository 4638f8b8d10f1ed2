"""Expand a path, a folder or a pattern into files."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nlgmoe.data.source_files import (
    COMPRESSIONS,
    JSON_LINES,
    PLAIN_TEXT,
    find_addressed,
    has_records,
    is_local,
    is_plain_text,
)
from nlgmoe.validation import SettingError

ENDINGS = ", ".join([*JSON_LINES, *PLAIN_TEXT, *(f"{JSON_LINES[0]}{ending}" for ending in COMPRESSIONS), ".parquet"])


def input_files(given: str | Sequence[str]) -> list[str]:
    """Return the input files, sorted within each pattern and folder. Plain text (a README) beside files of records is left out.

    Args:
        given: paths or addresses of fsspec (`s3://bucket/pile`) of files, folders and patterns, `**` for folders at any depth.
    """
    if not given:
        raise SettingError(f"input={given} is empty; give a path, a folder, or a pattern in quotes")
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
                raise SettingError(
                    f"input={source} is a folder without text files of its own; known endings are {ENDINGS}; for folders "
                    f"inside give patterns, such as '{source}/**/*.jsonl' or '{source}/**/*.txt'"
                )
            others = [os.path.basename(child) for child in children if child not in files]
            plain = [name for name in others if is_plain_text(name)]
            if plain:
                reason = (
                    f"plain text beside JSON lines or Parquet; to read it too, add '{source}/*{Path(plain[0]).suffix}'"
                )
            else:
                reason = f"known endings are {ENDINGS}; for folders inside give '{source}/**/*{Path(files[0]).suffix}'"
            if others:
                print(
                    f"note: {len(others)} entries of {source} are left out, such as {(plain or others)[0]}: {reason}",
                    file=sys.stderr,
                )
        if not files:
            raise SettingError(f"input={source} matches no file; give a path, a folder, or a pattern in quotes")
        all_files += files
    seen: set[str] = set()
    for file in all_files:
        if not (has_records(file) or is_plain_text(file)):
            raise SettingError(f"input={file} cannot be read; known endings are {ENDINGS}")
        real_path = os.path.realpath(file) if is_local(file) else file  # a file may have several names and links
        if real_path in seen:
            raise SettingError(f"input={file} is given more than once; its documents would be repeated")
        seen.add(real_path)
    return all_files
