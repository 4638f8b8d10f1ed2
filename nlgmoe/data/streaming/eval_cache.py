"""Tokens of some of a streamed corpus's documents, kept on disk for evaluation and statistics.

FOLDER/{number of the domain}.{split}.bin, .idx
FOLDER/files.json                                the corpus's files by split; written last
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from nlgmoe.data.indexed import IndexedDataset, token_dtype
from nlgmoe.data.indexed_writer import IndexedWriter
from nlgmoe.data.streaming.data_files import DataFile
from nlgmoe.data.streaming.logical_stream import StreamConfig
from nlgmoe.data.text.bad_data import BadData
from nlgmoe.data.text.documents import read_documents
from nlgmoe.data.text.records import FileOffset
from nlgmoe.data.tokenizer import SAME_TOKENIZER
from nlgmoe.files import write_json
from nlgmoe.validation import RunError

TRAINING_BYTES, TRAINING_FILES = 8_000_000, 64  # about, and at most, for statistics and the domains' shares
CHECKED_DOCUMENTS = 16  # documents of ids that are compared with the tokenizer


@dataclass(frozen=True)
class EvalCache:
    """Contents of the cache.

    Args:
        files: split -> files of the corpus.
        tokens: split -> tokens of each domain, [N_d] each; of "train" a sample.
    """

    files: Mapping[str, Sequence[DataFile]]
    tokens: Mapping[str, Sequence[np.ndarray]]


def cache_eval_tokens(folder: Path, files: Mapping[str, Sequence[DataFile]], config: StreamConfig, limit: int) -> None:
    """Write the first documents of each evaluated split and domain, and of the training files, unless it is done.

    Args:
        folder: of the cache.
        files: of the corpus, by split.
        config: of the streams.
        limit: evaluated tokens of a domain.
    """
    if read_files(folder) == files:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "files.json").unlink(missing_ok=True)
    bad = BadData(config.on_bad_data)

    if config.fields.ids is not None:
        records = (record for file in files["train"] for record in read_documents(file.path, config.fields, bad))
        first = [np.asarray(record.content) for record in islice(records, CHECKED_DOCUMENTS)]
        if (same := config.tokenizer.share_reproduced(first)) < SAME_TOKENIZER:
            raise RunError(
                f"ids_field={config.fields.ids} holds another tokenizer's ids: {same:.0%} of the first ones come back when their "
                f"text is tokenised with {config.tokenizer.name}; set data.tokenizer to the one they were made with"
            )
    for split in files:
        if split == "train":
            documents = _training_sample(files[split], config, bad)
        else:
            documents = _first_of_each_domain(files[split], config, bad, limit)
        if not _write(folder, split, documents, config):
            raise RunError(f"{files[split][0].path}: no document of the {split} files can be used; choose others")
    write_json(
        folder / "files.json", {split: [asdict(file) for file in split_files] for split, split_files in files.items()}
    )


def read_files(folder: Path) -> dict[str, list[DataFile]] | None:
    """Return the files of the corpus by split; None without a cache."""
    path = folder / "files.json"
    if not path.exists():
        return None
    try:
        return {split: [DataFile(**file) for file in files] for split, files in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete {folder} to have it made again") from error


def open_eval_cache(folder: Path, domains: int) -> EvalCache | None:
    """Map the tokens of `domains` domains; None without a cache."""
    files = read_files(folder)
    if files is None:
        return None
    tokens = {
        split: [IndexedDataset(_prefix(folder, domain, split)).tokens for domain in range(domains)] for split in files
    }
    return EvalCache(files, tokens)


def _training_sample(files: Sequence[DataFile], config: StreamConfig, bad: BadData) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the tokens and domain of the first documents of each file, as much of each as its share of all bytes.

    The files may be of one domain each. Of many files some are drawn.
    """
    drawn = random.Random(0).sample(range(len(files)), min(len(files), TRAINING_FILES))
    chosen = [files[index] for index in sorted(drawn)]
    share = TRAINING_BYTES / max(1, sum(file.bytes for file in chosen))
    for file in chosen:
        quota, taken = share * file.bytes if share < 1 else math.inf, 0
        offset = FileOffset()
        for record in read_documents(file.path, config.fields, bad):
            ((tokens, domain),) = config.tokens([record])
            size = record.after.bytes - offset.bytes
            if record.after.bytes == 0 or record.number > offset.documents:  # Parquet, or unusable documents before
                size = len(record.content) * (4 if config.fields.ids else 1)
            yield tokens[: math.ceil(len(tokens) * min(1.0, (quota - taken) / size))], domain
            offset, taken = record.after, taken + size
            if taken >= quota:
                break


def _first_of_each_domain(
    files: Sequence[DataFile], config: StreamConfig, bad: BadData, limit: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the tokens and domain of documents until there are `limit` of each domain; the last document is whole."""
    kept = [0] * len(config.domains)
    for file in files:
        for record in read_documents(file.path, config.fields, bad):
            if min(kept) >= limit:
                return
            if kept[config.domain(record)] < limit:
                ((tokens, domain),) = config.tokens([record])
                kept[domain] += len(tokens)
                yield tokens, domain


def _write(folder: Path, split: str, documents: Iterator[tuple[np.ndarray, int]], config: StreamConfig) -> int:
    """Write the documents of each domain; returns the tokens."""
    written, dtype = 0, token_dtype(config.tokenizer.vocab_size)
    with ExitStack() as stack:
        domains = range(len(config.domains))
        writers = [stack.enter_context(IndexedWriter(_prefix(folder, number, split), dtype)) for number in domains]
        for tokens, domain in documents:
            writers[domain].add_document(tokens)
            written += len(tokens)
    return written


def _prefix(folder: Path, domain: int, split: str) -> Path:
    return folder / f"{domain}.{split}"
