"""Text in files -> one corpus in Megatron's indexed format, tokenised by many processes.

One process reads the documents and writes their tokens; the others tokenise, a little text at a time. What comes back
is written in the order of the text, so that the result does not depend on the number of processes. Now and then what
is on disk is brought together with the place in the text that it reaches to: a build that was killed goes on there.

    PREFIX.building/bin, lengths, ends   the tokens so far and what their index will be made of
    PREFIX.building/progress.json        up to where these are whole, and what they were made from

PREFIX.bin and PREFIX.idx appear when everything is done.
"""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from nlgmoe.data.indexed import IndexedWriter, token_dtype
from nlgmoe.data.text.bad_data import BadData, summary
from nlgmoe.data.text.documents import read_documents
from nlgmoe.data.text.records import Fields, FileOffset
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.worker_signals import ignore_worker_signals
from nlgmoe.files import write_json

CHUNK_BYTES = 1 << 18  # of text, tokenised together: a tokenizer holds a hundred times as much for a moment
WAITING = 3  # chunks on their way for each process
RECORD_SECONDS = 30.0  # between two records of progress: what a killed build loses


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Args:
        file: number of the input file that is being read, from 0; behind the last one, how many there are.
        place: in that file.
        documents: written.
        bytes: UTF-8 bytes of their texts.
        tokens: written, one end-of-document token per document included.
        skipped: how many things of each kind could not be used.
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
        prefix: path without `.bin` / `.idx`; neither is there yet.
        tokenizer: of the tokens.
        fields: of a record that are read.
        bad: what becomes of documents and files that cannot be used.
        workers: processes that tokenise.
        report: gets the progress at the start and whenever more is written.

    Raises:
        ValueError: data cannot be used and `bad` says "error"; something else was being built there, or still is;
            a process has died.
    """
    folder = prefix.with_name(f"{prefix.name}.building")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "files": [[file, os.path.getsize(file) if os.path.exists(file) else None] for file in files],
        "tokenizer": tokenizer.fingerprint,
        "fields": asdict(fields),
    }
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is in use: another process builds {prefix.name}; wait for it, or stop it."
        ) from None
    try:
        done, sizes = _read_progress(folder, settings)
        report(done)
        with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size), folder, sizes) as writer:
            recorded = time.monotonic()
            with closing(_tokenised(files, tokenizer, fields, bad, workers, done)) as chunks:
                for tokens, lengths, reached in chunks:
                    for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                        writer.add_document(tokens[end - length : end])
                    report(done := reached)
                    if done.documents and time.monotonic() - recorded >= RECORD_SECONDS:
                        record = {"settings": settings, "sizes": writer.position(), "done": asdict(done)}
                        write_json(folder / "progress.json", record)
                        recorded = time.monotonic()
            if done.documents == 0:
                raise ValueError(
                    f"input has no document that can be used in {len(files)} files ({summary(done.skipped)}); give others, "
                    "or the text_field that theirs have"
                )
    finally:
        if not (folder / "progress.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
    return done


def _read_progress(folder: Path, settings: dict[str, Any]) -> tuple[Progress, dict[str, int] | None]:
    path = folder / "progress.json"
    if not path.exists():
        return Progress(), None
    try:
        found = json.loads(path.read_text())
        done = Progress(**found["done"] | {"place": FileOffset(**found["done"]["place"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete {folder} to begin again.") from error
    if differing := [name for name in settings if found["settings"].get(name) != settings[name]]:
        raise ValueError(
            f"{folder} was begun with other settings ({', '.join(differing)}): give the same ones to go on with it, "
            "name another output, or delete it."
        )
    return done, found["sizes"]


@dataclass(frozen=True)
class _Chunk:
    texts: list[str]
    reached: Progress  # when these are written; documents, bytes and tokens are added as they come


def _chunks(files: Sequence[str], fields: Fields, bad: BadData, done: Progress) -> Iterator[_Chunk]:
    texts: list[str] = []
    size = 0
    for number in range(done.file, len(files)):
        start = done.place if number == done.file else FileOffset()
        for record in read_documents(files[number], fields, bad, start=start):
            assert isinstance(record.content, str)
            texts.append(record.content)
            size += len(record.content)
            if size >= CHUNK_BYTES:
                yield _Chunk(texts, Progress(number, record.after, skipped=dict(bad.skipped)))
                texts, size = [], 0
    yield _Chunk(texts, Progress(len(files), skipped=dict(bad.skipped)))


def _tokenised(
    files: Sequence[str], tokenizer: Tokenizer, fields: Fields, bad: BadData, workers: int, done: Progress
) -> Generator[tuple[np.ndarray, np.ndarray, Progress], None, None]:
    """Tokens of a chunk, how many each of its documents has, and how far the build is with them."""
    bad.skipped.update(done.skipped)
    waiting: deque[tuple[_Chunk, Future[tuple[np.ndarray, np.ndarray, int]]]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (tokenizer,))
    try:
        pool.submit(os.getpid).result()  # all processes are forked here, before reading has started threads
        chunks = _chunks(files, fields, bad, done)
        more = True
        while more or waiting:
            while more and len(waiting) < WAITING * workers:
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                else:
                    waiting.append((chunk, pool.submit(_tokenise, chunk.texts)))
            if waiting:
                chunk, future = waiting.popleft()
                tokens, lengths, size = future.result()
                done = replace(
                    chunk.reached,
                    documents=done.documents + len(lengths),
                    bytes=done.bytes + size,
                    tokens=done.tokens + len(tokens),
                )
                yield tokens, lengths, done
    except BrokenProcessPool as error:
        raise ValueError(
            "A tokenising process was killed, most likely for want of memory: give fewer workers. What is done is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---- in a tokenising process

_tokenizer: Tokenizer


def _begin(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs at once
    ignore_worker_signals(0)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _tokenise(texts: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens of the texts, each closed; tokens of each; UTF-8 bytes of all."""
    ids = [
        np.array([*ids, _tokenizer.eod_id], token_dtype(_tokenizer.vocab_size))
        for ids in _tokenizer.encode_batch(texts)
    ]
    lengths = np.array([len(document) for document in ids], dtype=np.int64)
    tokens = np.concatenate(ids) if ids else np.zeros(0, token_dtype(_tokenizer.vocab_size))
    return tokens, lengths, sum(len(text.encode()) for text in texts)
