"""What is kept of a streamed corpus: the tokens of its first documents, for evaluation and statistics.

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
from nlgmoe.data.streaming.logical_stream import StreamConfig
from nlgmoe.data.streaming.text_files import TextFile
from nlgmoe.data.text.bad_data import BadData
from nlgmoe.data.text.documents import read_documents
from nlgmoe.data.text.records import Record
from nlgmoe.data.tokenizer import SAME_TOKENIZER
from nlgmoe.files import write_json

TRAINING_DOCUMENTS = 2000  # looked at for statistics
CHECKED_DOCUMENTS = 16  # of ids, that are compared with the tokenizer


@dataclass(frozen=True)
class EvalCache:
    """What is kept.

    Args:
        files: split -> the corpus's files.
        tokens: split -> tokens of each domain, [N_d] each; of "train" a sample.
    """

    files: Mapping[str, Sequence[TextFile]]
    tokens: Mapping[str, Sequence[np.ndarray]]


def cache_eval_tokens(folder: Path, files: Mapping[str, Sequence[TextFile]], config: StreamConfig, limit: int) -> None:
    """Keep the first documents of each split and domain, unless those of the same files are there.

    Args:
        folder: where.
        files: of the corpus, by split.
        config: how they are read.
        limit: of evaluated tokens of a domain; the document that reaches it is kept whole.

    Raises:
        ValueError: data cannot be used and the policy is to say so, or the ids are another tokenizer's.
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


def read_files(folder: Path) -> dict[str, list[TextFile]] | None:
    """The corpus's files by split; None if nothing is kept.

    Raises:
        ValueError: the list of them is damaged.
    """
    path = folder / "files.json"
    if not path.exists():
        return None
    try:
        return {split: [TextFile(**file) for file in files] for split, files in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {folder} to have it made again") from error


def open_eval_cache(folder: Path, domains: int) -> EvalCache | None:
    """Map what is kept of so many domains; None if nothing is.

    Raises:
        ValueError: it is damaged.
    """
    files = read_files(folder)
    if files is None:
        return None
    tokens = {split: [IndexedDataset(_prefix(folder, d, split)).tokens for d in range(domains)] for split in files}
    return EvalCache(files, tokens)


def _write(folder: Path, split: str, records: Iterator[Record], config: StreamConfig, limit: int) -> int:
    """Write the domains' first documents; returns how many tokens there are."""
    kept = [0] * len(config.domains)

    def wanted() -> Iterator[Record]:
        for record in records:
            if min(kept) >= limit:
                return
            if kept[config.domain(record)] < limit:
                yield record

    dtype = token_dtype(config.tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(_prefix(folder, d, split), dtype)) for d in range(len(kept))]
        chosen = wanted()
        while record := next(chosen, None):
            for tokens, domain in config.tokens([record]):
                writers[domain].add_document(tokens)
                kept[domain] += len(tokens)
    return sum(kept)


def _prefix(folder: Path, domain: int, split: str) -> Path:
    return folder / f"{domain}.{split}"
