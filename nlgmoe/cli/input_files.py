"""Expand a path, a folder or a pattern into files."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fsspec.core import url_to_fs

from nlgmoe.data.text.documents import COMPRESSIONS, JSON_LINES, PLAIN_TEXT, has_records, is_plain_text
from nlgmoe.validation import SettingError

ENDINGS = ", ".join([*JSON_LINES, *PLAIN_TEXT, *(f"{JSON_LINES[0]}{ending}" for ending in COMPRESSIONS), ".parquet"])


def input_files(given: str | Sequence[str]) -> list[str]:
    """Files of text, those of each pattern and folder by name. Of a folder with records, plain text (a README) is left out.

    Args:
        given: paths, folders and patterns, `**` for folders at any depth; addresses (`hf://...`) are taken as they are.
    """
    if not given:
        raise SettingError(f"input={given} names nothing; give a path, a folder, or a pattern in quotes")
    found: list[str] = []
    for one in [given] if isinstance(given, str) else given:
        if "://" in one:
            try:
                url_to_fs(one)
            except (ImportError, ValueError) as error:
                raise SettingError(
                    f"input={one} cannot be read here ({error}); install what reads it, or give a path"
                ) from error
            files = [one]
        elif Path(one).is_dir():
            inside = sorted(path for path in Path(one).iterdir() if not path.name.startswith("."))  # as of a pattern
            readable = [path for path in inside if has_records(path)] or [
                path for path in inside if is_plain_text(path)
            ]
            files = [str(path) for path in readable]
            if others := [path.name for path in inside if path not in readable]:
                print(
                    f"note: {len(others)} of what is in {one} are left out, such as {others[0]}: known endings are {ENDINGS}; "
                    f"for folders inside give '{one}/**/*{Path(files[0]).suffix if files else JSON_LINES[0]}'",
                    file=sys.stderr,
                )
        else:
            files = [one] if Path(one).exists() else sorted(glob.glob(one, recursive=True))
        if not files:
            raise SettingError(f"input={one} stands for no file; give a path, a folder, or a pattern in quotes")
        found += files
    seen: set[str] = set()
    for file in found:
        if not (has_records(file) or is_plain_text(file)):
            raise SettingError(f"input={file} cannot be read; known endings are {ENDINGS}")
        if "://" not in file and not Path(file).is_file():  # to open a FIFO would block
            raise SettingError(f"input={file} is no regular file; give one, or a folder of them")
        itself = file if "://" in file else os.path.realpath(file)  # under whatever name, or behind a link
        if itself in seen:
            raise SettingError(f"input={file} is given more than once; its documents would be there more than once")
        seen.add(itself)
    return found
