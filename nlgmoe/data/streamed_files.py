"""The files of a streamed corpus, and tokens of some of its documents, kept on disk for evaluation and statistics.

FOLDER/{number of the split}-{number of the domain}.bin, .idx
FOLDER/files.json                                             the corpus's files by split; written last
"""

import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from huggingface_hub.errors import HTTPError

from nlgmoe.data.corpus import hash_of_pieces
from nlgmoe.data.documents import read_documents, read_shares
from nlgmoe.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from nlgmoe.data.source_files import DataFile, describe_file, find_addressed, has_records, is_local
from nlgmoe.data.streams import StreamConfig
from nlgmoe.files import write_json
from nlgmoe.validation import RunError, SettingError

HASHED_PIECES = 1024  # of 32 KB, about, of all training files
TRAINING_BYTES, TRAINING_FILES = 8_000_000, 64  # about, and at most, for statistics and the domains' shares
SEARCHED_BYTES = 100_000_000  # of text, for the next document of a domain that lacks some
SPLITS = ("train", "validation", "test")


def cache_eval_tokens(folder: Path, files: Mapping[str, Sequence[DataFile]], config: StreamConfig, limit: int) -> None:
    """Write about `limit` tokens of each evaluation split and domain, and a sample of the training files, unless they exist."""
    if read_files(folder) == files:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "files.json").unlink(missing_ok=True)
    for split, found in files.items():
        trains = split == "train"
        documents = _training_sample(found, config) if trains else _first_of_each_domain(found, config, limit)
        if not _write(folder, split, documents, config):
            raise RunError(f"{found[0].path}: no document of the {split} files can be used; choose others")
    write_json(folder / "files.json", {split: [asdict(file) for file in found] for split, found in files.items()})


def read_files(folder: Path) -> dict[str, list[DataFile]] | None:
    """Return the files of the corpus by split; None without a cache."""
    path = folder / "files.json"
    if not path.exists():
        return None
    return {split: [DataFile(**file) for file in files] for split, files in json.loads(path.read_text()).items()}


def open_eval_cache(folder: Path, domains: int) -> tuple[dict[str, list[DataFile]], dict[str, list[np.ndarray]]] | None:
    """Return the files, and map the tokens of `domains` domains, [N_d], of "train" a sample; both by split. None: no cache."""
    files = read_files(folder)
    if files is None:
        return None
    prefixes = {split: [_prefix(folder, domain, split) for domain in range(domains)] for split in files}
    return files, {split: [IndexedDataset(prefix).tokens for prefix in found] for split, found in prefixes.items()}


def _training_sample(files: Sequence[DataFile], config: StreamConfig) -> Iterator[tuple[np.ndarray, int]]:
    """Yield tokens and domain of the first documents of each file, in proportion to the sizes of files.

    All files are read, since each may have one domain; of many files, a random sample.
    """
    drawn = random.Random(0).sample(range(len(files)), min(len(files), TRAINING_FILES))
    chosen = [files[index] for index in sorted(drawn)]
    for record, share in read_shares(chosen, config.fields, TRAINING_BYTES):
        tokens = config.tokens(record)
        yield tokens[: math.ceil(len(tokens) * share)], config.domain(record)


def _first_of_each_domain(
    files: Sequence[DataFile], config: StreamConfig, limit: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the tokens and domain of documents until there are `limit` of each domain; the last document is whole.

    A domain may be rare, or absent: `SEARCHED_BYTES` after the last document that was of use, the search ends.
    """
    kept, searched = [0] * len(config.domains), 0
    for record in (record for file in files for record in read_documents(file.path, config.fields)):
        domain = config.domain(record)
        searched += record.bytes
        if kept[domain] < limit:
            tokens = config.tokens(record)
            kept[domain] += len(tokens)
            searched = 0
            yield tokens, domain
        if min(kept) >= limit or searched >= SEARCHED_BYTES:
            return


def _write(folder: Path, split: str, documents: Iterator[tuple[np.ndarray, int]], config: StreamConfig) -> int:
    written, dtype = 0, token_dtype(config.tokenizer.vocab_size)
    with ExitStack() as stack:
        domains = range(len(config.domains))
        writers = [stack.enter_context(IndexedWriter(_prefix(folder, number, split), dtype)) for number in domains]
        for tokens, domain in documents:
            writers[domain].add_document(tokens)
            written += len(tokens)
    return written


def _prefix(folder: Path, domain: int, split: str) -> Path:
    # A file named after a split would be found as one of the corpus, in a folder around this one.
    return folder / f"{SPLITS.index(split)}-{domain}"


def find_files(
    path: str, data_files: Mapping[str, str | list[str]] | None, revision: str | None
) -> dict[str, list[DataFile]]:
    """Return the files of each split by name.

    Args:
        path: a folder, a data set on the hub, or the address of a folder that fsspec reads, such as `s3://bucket/pile`.
        data_files: as in `datasets.load_dataset`; patterns in `path`, or addresses of their own.
        revision: as in `datasets.load_dataset`.
    """
    patterns = {split: [given] if isinstance(given, str) else given for split, given in (data_files or {}).items()}
    if further := patterns.keys() - set(SPLITS):
        raise SettingError(f"data_files.{min(further)}: splits are {', '.join(SPLITS)}")
    if all(map(is_local, [path, *chain(*patterns.values())])):
        files_by_split = _find_by_datasets(path, data_files, revision)
    else:
        files_by_split = {split: [] for split in patterns}
        for split, name in ((split, name) for split, names in patterns.items() for name in names):
            files_by_split[split] += find_addressed(f"{path}/{name}" if is_local(name) else name)
    files_by_split = {split: sorted(set(files)) for split, files in files_by_split.items() if files and split in SPLITS}
    if missing := {"train", "validation"} - files_by_split.keys():
        remedy = "name them in data_files, such as {train: train/*.jsonl.zst, validation: val.jsonl.zst}"
        raise SettingError(f"path={path} has no files for {' and '.join(sorted(missing))}: {remedy}")
    if unknown := [file for files in files_by_split.values() for file in files if not has_records(file)]:
        problem = f"{unknown[0]} is neither JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) nor .parquet"
        raise SettingError(f"path={path}: {problem}; choose others with data_files")
    evaluated = {os.path.realpath(file) for split in ("validation", "test") for file in files_by_split.get(split, ())}
    if shared := [file for file in files_by_split["train"] if os.path.realpath(file) in evaluated]:
        problem = f"{shared[0]} is a file of training and of evaluation, which would measure text that was trained on"
        raise SettingError(f"path={path}: {problem}; give other names or patterns in data_files")
    described = {split: [describe_file(file) for file in files] for split, files in files_by_split.items()}
    pieces = max(2, HASHED_PIECES // len(described["train"]))
    for place, file in enumerate(described["train"]):
        contents = file.path if file.path.startswith(f"hf://datasets/{path}@") else file.contents
        described["train"][place] = replace(file, contents=contents or hash_of_pieces(file.path, pieces))
    return described


def _find_by_datasets(
    path: str, data_files: Mapping[str, str | list[str]] | None, revision: str | None
) -> dict[str, list[str]]:
    # Imported here: it takes seconds.
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(path, data_files=data_files, revision=revision)
    except (OSError, HTTPError, ValueError, RuntimeError, ImportError, BadZipFile, IndexError, StopIteration) as error:
        # A long list of endings is cut off. The last two types are raised if path or data_files names no files.
        reason = str(error).partition(" with any supported extension")[0].rstrip(".")
        reason = "it names no files" if isinstance(error, IndexError | StopIteration) else reason
        of_network = isinstance(error, ConnectionError | TimeoutError | HTTPError)
        remedy = "set it to a folder, an address or a data set on the hub, and data_files to names or patterns in it"
        raise (RunError if of_network else SettingError)(f"path={path}: {reason}; {remedy}") from error
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
