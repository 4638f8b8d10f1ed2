"""Text files to one corpus in Megatron's indexed format. A build that was killed resumes.

The tokenizer releases the GIL: threads tokenise chunks of text, whose tokens are written in the order of the text. The
result does not depend on the number of threads.

    PREFIX.building/bin, lengths, ends   the tokens so far, and what their index is made from
    PREFIX.building/progress.json        up to where these are complete, and what they were made from

PREFIX.bin and PREFIX.idx appear when the build is done.
"""

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from nlgmoe.data.indexed import token_dtype
from nlgmoe.data.indexed_writer import IndexedWriter
from nlgmoe.data.streaming.data_files import describe_file
from nlgmoe.data.text.bad_data import BadData, summary
from nlgmoe.data.text.documents import read_documents
from nlgmoe.data.text.records import Fields, FileOffset
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.files import write_json
from nlgmoe.validation import RunError, SettingError

CHUNK_BYTES = 1 << 18  # of text, tokenised together: a tokenizer holds a hundred times as much for a moment
QUEUED = 3  # chunks per thread that are read ahead
RECORD_SECONDS = 30.0  # between two records of progress: what a killed build loses


@dataclass(frozen=True)
class Progress:
    """Progress of a build.

    Args:
        file: index of the input file that is being read; after the last one, their number.
        place: in that file.
        documents: written.
        bytes: UTF-8 bytes of their texts.
        tokens: written, one end-of-document token per document included.
        skipped: unusable documents and files by kind.
    """

    file: int = 0
    place: FileOffset = field(default_factory=FileOffset)
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


def build_indexed(
    files: Sequence[str],
    prefix: Path,
    tokenizer: Tokenizer,
    fields: Fields,
    bad: BadData,
    workers: int,
    report: Callable[[Progress], object],
) -> Progress:
    """Write `prefix.bin` and `prefix.idx`: a sequence for each document, closed by the end-of-document token.

    Args:
        files: what `read_documents` can read, in the order of the result.
        prefix: path without `.bin` / `.idx`.
        tokenizer: of the tokens.
        fields: of a record that are read.
        bad: policy for unusable documents and files.
        workers: threads that tokenise.
        report: gets the progress at the start and after each chunk.
    """
    folder = prefix.with_name(f"{prefix.name}.building")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "files": [asdict(describe_file(file)) if os.path.exists(file) else file for file in files],
        "tokenizer": tokenizer.fingerprint,
        "fields": asdict(fields),
    }
    try:
        with FileLock(folder / ".lock", timeout=0):
            _check_new(prefix)
            done, sizes = _read_progress(folder, settings)
            chunks = _tokenise(files, tokenizer, fields, bad, workers, done)
            report(done)
            with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size), folder, sizes) as writer:
                recorded = time.monotonic()
                for documents, done in chunks:
                    for tokens in documents:
                        writer.add_document(tokens)
                    report(done)
                    if done.documents and time.monotonic() - recorded >= RECORD_SECONDS:
                        record = {"settings": settings, "sizes": writer.position(), "done": asdict(done)}
                        write_json(folder / "progress.json", record)
                        recorded = time.monotonic()
                if done.documents == 0:
                    raise RunError(
                        f"input has no document that can be used in {len(files)} files ({summary(done.skipped)}); give "
                        "others, or the text_field that theirs have"
                    )
    except Timeout:
        raise RunError(f"{folder} is in use: another process builds {prefix.name}; wait for it, or stop it.") from None
    except BaseException as error:
        if not (resumes := (folder / "progress.json").exists()):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # of a write
            then = "it goes on" if resumes else "from the beginning"
            raise RunError(
                f"output={prefix} cannot be written ({error.strerror}); make room, and start again: {then}"
            ) from error
        raise
    return done


def _check_new(prefix: Path) -> None:
    """Check that no corpus of this name exists, but for a .bin that a killed build has moved there before its .idx."""
    parts = prefix.with_name(f"{prefix.name}.building")
    moved = (parts / "idx").exists() and not (parts / "bin").exists()
    for kind in ("idx",) if moved else ("idx", "bin"):
        if Path(f"{prefix}.{kind}").exists():
            raise SettingError(f"output={prefix}: {prefix}.{kind} exists already; name another output, or delete it")


def _read_progress(folder: Path, settings: dict[str, Any]) -> tuple[Progress, dict[str, int] | None]:
    path = folder / "progress.json"
    if not path.exists():
        return Progress(), None
    try:
        found = json.loads(path.read_text())
        done = Progress(**found["done"] | {"place": FileOffset(**found["done"]["place"])})
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): delete {folder} to begin again.") from error
    if differing := [name for name in settings if found["settings"].get(name) != settings[name]]:
        raise RunError(
            f"{folder} was begun with other settings ({', '.join(differing)}): give the same ones to go on with it, "
            "name another output, or delete it."
        )
    return done, found["sizes"]


def _chunks(files: Sequence[str], fields: Fields, bad: BadData, done: Progress) -> Iterator[tuple[list[str], Progress]]:
    """Texts from `done` on, and how far the files are read with them; the counts of documents are added later."""
    texts: list[str] = []
    size = 0
    for number in range(done.file, len(files)):
        start = done.place if number == done.file else FileOffset()
        for record in read_documents(files[number], fields, bad, start=start):
            assert isinstance(record.content, str)
            texts.append(record.content)
            size += len(record.content)
            if size >= CHUNK_BYTES:
                yield texts, Progress(number, record.after, skipped=dict(bad.skipped))
                texts, size = [], 0
    yield texts, Progress(len(files), skipped=dict(bad.skipped))


def _tokenise(
    files: Sequence[str], tokenizer: Tokenizer, fields: Fields, bad: BadData, workers: int, done: Progress
) -> Iterator[tuple[list[np.ndarray], Progress]]:
    """Tokens of each document of a chunk, and the progress once they are written; chunks in the order of the text."""
    bad.skipped.update(done.skipped)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each thread has a chunk of its own
    dtype = token_dtype(tokenizer.vocab_size)

    def encode(texts: list[str]) -> tuple[list[np.ndarray], int]:
        documents = [np.array([*ids, tokenizer.eod_id], dtype) for ids in tokenizer.encode_batch(texts)]
        return documents, sum(len(text.encode()) for text in texts)

    queue: deque[tuple[Progress, Future[tuple[list[np.ndarray], int]]]] = deque()
    chunks = _chunks(files, fields, bad, done)
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(queue) < QUEUED * workers and (chunk := next(chunks, None)) is not None:
                queue.append((chunk[1], pool.submit(encode, chunk[0])))
            if not queue:
                return
            progress, future = queue.popleft()
            documents, size = future.result()
            done = replace(
                progress,
                documents=done.documents + len(documents),
                bytes=done.bytes + size,
                tokens=done.tokens + sum(map(len, documents)),
            )
            yield documents, done
