"""Expand a path, a folder or a pattern into files."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fsspec.core import url_to_fs

from nlgmoe.data.documents import COMPRESSIONS, JSON_LINES, PLAIN_TEXT, has_records, is_plain_text
from nlgmoe.validation import SettingError

ENDINGS = ", ".join([*JSON_LINES, *PLAIN_TEXT, *(f"{JSON_LINES[0]}{ending}" for ending in COMPRESSIONS), ".parquet"])


def input_files(given: str | Sequence[str]) -> list[str]:
    """Return the input files, sorted within each pattern and folder. Plain text (a README) beside files of records is left out.

    Args:
        given: paths, folders and patterns, `**` for folders at any depth; addresses (`hf://...`) are returned unchanged.
    """
    if not given:
        raise SettingError(f"input={given} is empty; give a path, a folder, or a pattern in quotes")
    all_files: list[str] = []
    for source in [given] if isinstance(given, str) else given:
        if "://" in source:
            try:
                url_to_fs(source)
            except (ImportError, ValueError) as error:
                raise SettingError(
                    f"input={source} cannot be read here ({error}); install the package that reads it, or give a path"
                ) from error
            files = [source]
        elif Path(source).is_dir():
            # Hidden files are skipped, as by patterns, and so is the .json of a corpus.
            children = sorted(
                path
                for path in Path(source).iterdir()
                if not (path.name.startswith(".") or (path.suffix == ".json" and path.with_suffix(".idx").exists()))
            )
            readable = [path for path in children if has_records(path)] or [
                path for path in children if is_plain_text(path)
            ]
            files = [str(path) for path in readable]
            if others := [path.name for path in children if path not in readable]:
                print(
                    f"note: {len(others)} entries of {source} are left out, such as {others[0]}: known endings are {ENDINGS}; "
                    f"for folders inside give '{source}/**/*{Path(files[0]).suffix if files else JSON_LINES[0]}'",
                    file=sys.stderr,
                )
        else:
            files = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
        if not files:
            raise SettingError(f"input={source} matches no file; give a path, a folder, or a pattern in quotes")
        all_files += files
    seen: set[str] = set()
    for file in all_files:
        if not (has_records(file) or is_plain_text(file)):
            raise SettingError(f"input={file} cannot be read; known endings are {ENDINGS}")
        real_path = file if "://" in file else os.path.realpath(file)  # a file may have several names and links
        if real_path in seen:
            raise SettingError(f"input={file} is given more than once; its documents would be repeated")
        seen.add(real_path)
    return all_files
