"""The files of a data set on the Hugging Face hub, or in a folder, by split."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from zipfile import BadZipFile

from fsspec.core import url_to_fs

from nlgmoe.data.text.documents import has_records
from nlgmoe.validation import SettingError


@dataclass(frozen=True)
class DataFile:
    """One file.

    Args:
        path: local, or an address such as `hf://datasets/NAME@COMMIT/train/00.jsonl.zst`.
        bytes: its size.
        modified: when a local file was written, in seconds; None on the hub, where the path holds the commit.
    """

    path: str
    bytes: int
    modified: float | None = None


def find_files(
    path: str, data_files: Mapping[str, str | list[str]] | None, revision: str | None
) -> dict[str, list[DataFile]]:
    """Split -> its files, by name. The arguments are those of `datasets.load_dataset`."""
    # Imported here: it takes seconds.
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(path, data_files=data_files, revision=revision)
    except (OSError, ValueError, ImportError, BadZipFile, IndexError, StopIteration) as error:
        # A long list of endings is cut off. The last two types are raised if path or data_files names no files.
        reason = str(error).partition(" with any supported extension")[0].rstrip(".")
        reason = reason if isinstance(error, OSError | ValueError | ImportError | BadZipFile) else "it names no files"
        of_network = isinstance(error, ConnectionError | TimeoutError)
        raise (ValueError if of_network else SettingError)(
            f"path={path}: {reason}; set it to a folder or to a data set on the Hugging Face hub, and data_files to names or "
            "patterns in it"
        ) from error
    files_by_split = {str(split): sorted(set(files)) for split, files in (builder.config.data_files or {}).items()}
    if missing := {"train", "validation"} - files_by_split.keys():
        raise SettingError(
            f"path={path} has no files for {' and '.join(sorted(missing))}: name them in data_files, such as "
            "{train: train/*.jsonl.zst, validation: val.jsonl.zst}"
        )
    if unknown := [file for files in files_by_split.values() for file in files if not has_records(file)]:
        raise SettingError(
            f"path={path}: {unknown[0]} is neither JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) nor .parquet; choose others "
            "with data_files"
        )
    evaluated = {os.path.realpath(file) for split in ("validation", "test") for file in files_by_split.get(split, ())}
    if shared := [file for file in files_by_split["train"] if os.path.realpath(file) in evaluated]:
        raise SettingError(
            f"path={path}: {shared[0]} is a file of training and of evaluation, which would then measure text that was trained "
            "on; give other names or patterns in data_files, or copy the file if that is what you want"
        )
    return {split: [describe_file(file) for file in files] for split, files in files_by_split.items()}


def describe_file(path: str) -> DataFile:
    """Look up size and time of a file, by which a change is found."""
    file_system, name = url_to_fs(path)
    info = file_system.info(name)
    return DataFile(path, int(info["size"]), info.get("mtime"))
