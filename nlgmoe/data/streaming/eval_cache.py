"""Tokens of a streamed corpus's first documents, kept on disk for evaluation and statistics.

FOLDER/{number of the domain}.{split}.bin, .idx
FOLDER/files.json                                the corpus's files by split; written last
"""

import json
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
from nlgmoe.data.text.records import Record
from nlgmoe.data.tokenizer import SAME_TOKENIZER
from nlgmoe.files import write_json

TRAINING_DOCUMENTS, TRAINING_TOKENS = 2000, 10_000_000  # at most, for statistics and the domains' shares
CHECKED_DOCUMENTS = 16  # of ids, that are compared with the tokenizer


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
    """Write the first documents of each split and domain, unless the cache has those of the same files.

    Args:
        folder: of the cache.
        files: of the corpus, by split.
        config: of the streams.
        limit: of evaluated tokens of a domain; the document that reaches it is kept whole.

    Raises:
        ValueError: data is unusable and the policy is "error", or the ids are another tokenizer's.
    """
    if read_files(folder) == files:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "files.json").unlink(missing_ok=True)
    bad = BadData(config.on_bad_data)

    def records(split: str) -> Iterator[Record]:
        for file in files[split]:
            yield from read_documents(file.path, config.fields, bad)

    if config.fields.ids is not None:
        first = [np.asarray(record.content) for record in islice(records("train"), CHECKED_DOCUMENTS)]
        if (same := config.tokenizer.share_reproduced(first)) < SAME_TOKENIZER:
            raise ValueError(
                f"ids_field={config.fields.ids} holds another tokenizer's ids: {same:.0%} of the first ones come back when their "
                f"text is tokenised with {config.tokenizer.name}; set data.tokenizer to the one they were made with"
            )
    for split in files:
        chosen = islice(records(split), TRAINING_DOCUMENTS) if split == "train" else records(split)
        if not _write(folder, split, chosen, config, limit):
            raise ValueError(f"{files[split][0].path}: no document of the {split} files can be used; choose others")
    write_json(folder / "files.json", {split: [asdict(file) for file in found] for split, found in files.items()})


def read_files(folder: Path) -> dict[str, list[DataFile]] | None:
    """Return the files of the corpus by split; None without a cache.

    Raises:
        ValueError: the list of them is damaged.
    """
    path = folder / "files.json"
    if not path.exists():
        return None
    try:
        return {split: [DataFile(**file) for file in files] for split, files in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {folder} to have it made again") from error


def open_eval_cache(folder: Path, domains: int) -> EvalCache | None:
    """Map the tokens of `domains` domains; None without a cache.

    Raises:
        ValueError: it is damaged.
    """
    files = read_files(folder)
    if files is None:
        return None
    tokens = {split: [IndexedDataset(_prefix(folder, d, split)).tokens for d in range(domains)] for split in files}
    return EvalCache(files, tokens)


def _write(folder: Path, split: str, records: Iterator[Record], config: StreamConfig, limit: int) -> int:
    """Write the first documents of each domain, of "train" the first of all: domains keep their shares; returns the tokens."""
    kept = [0] * len(config.domains)
    dtype = token_dtype(config.tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(_prefix(folder, d, split), dtype)) for d in range(len(kept))]
        for record in records:
            if sum(kept) >= TRAINING_TOKENS if split == "train" else min(kept) >= limit:
                break
            if split == "train" or kept[config.domain(record)] < limit:
                ((tokens, domain),) = config.tokens([record])
                writers[domain].add_document(tokens)
                kept[domain] += len(tokens)
    return sum(kept)


def _prefix(folder: Path, domain: int, split: str) -> Path:
    return folder / f"{domain}.{split}"
