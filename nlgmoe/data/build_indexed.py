"""Convert text files to one corpus in Megatron's indexed format. A killed build can be resumed.

Threads tokenise chunks of text, since the tokenizer releases the GIL. Tokens are written in the order of the text; documents held
out for validation, chosen by hash, come last. The result does not depend on the number of threads.

    PREFIX.building/bin, lengths         the tokens so far, and the data of their index
    PREFIX.building/validation           the same of the documents held out
    PREFIX.building/progress.json        progress that these files contain, and settings of the build

PREFIX.bin, PREFIX.json and PREFIX.idx appear when the build is done.
"""

import json
import os
import shutil
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from nlgmoe.data.documents import Fields, Skip, read_documents
from nlgmoe.data.indexed import IndexedWriter, token_dtype
from nlgmoe.data.prefix import describe
from nlgmoe.data.source_files import WHOLE, describe_file, is_local
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.files import write_json
from nlgmoe.validation import RunError, SettingError

CHUNK_CHARACTERS = 1 << 18  # tokenised together; the tokenizer needs a hundred times as much memory
QUEUED = 3  # chunks per thread that are read ahead
RECORD_SECONDS = 30.0  # between two records of progress; a killed build loses no more
SMALL_BYTES = 5_000_000  # of files, below which more is held out
HELD_OUT, HELD_OUT_OF_SMALL = 0.02, 0.1  # shares of the documents
VALIDATION_TOKENS = 2048  # at least, of a small corpus a tenth: a sequence of the paper's models


@dataclass(frozen=True)
class Progress:
    """Progress of a build."""

    file: int = 0  # index of the input file that is being read; after the last one, their number
    number: int = 0  # index of the next document in that file
    documents: int = 0  # written
    bytes: int = 0  # UTF-8, of their texts
    tokens: int = 0  # written, one end-of-document token per document included
    held_out: int = 0  # documents of those written that are for validation; at the end, with those of `enough_held_out`
    skipped: int = 0  # documents, files and ends of files that could not be used
    empty: int = 0  # documents without text, which were left out


def build_indexed(
    files: Sequence[str],
    prefix: Path,
    tokenizer: Tokenizer,
    fields: Fields,
    workers: int,
    report: Callable[[Progress], object],
    skip: Skip | None = None,
    domain: str | None = None,
    whole: Sequence[str] | None = None,
) -> Progress:
    """Write the files of a prefix: a sequence for each document, closed by the end-of-document token.

    Args:
        files: what `read_documents` can read, in the order of the result. The documents held out follow all others.
        prefix: path without `.bin` / `.idx`.
        workers: number of threads that tokenise.
        report: called with the progress at the start and after each chunk.
        skip: called with place and reason of unusable data; None: raise an error.
        domain: name of the documents' domain; None: the last part of the prefix, without the number of a shard.
        whole: all files of the corpus of which this is a part, whose size determines the share held out; the part may be empty.
            None: `files` are all.
    """
    folder = building(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    described = {file: describe_file(file) for file in whole or files}
    # Some servers report no size: such files are taken as large.
    size = sum(file.bytes or (0 if is_local(file.path) else SMALL_BYTES) for file in described.values())
    settings: dict[str, Any] = {
        "files": [asdict(described[file]) for file in files],
        "held out": HELD_OUT if size >= SMALL_BYTES else HELD_OUT_OF_SMALL,
        "tokenizer": tokenizer.fingerprint,
        "special_tokens": tokenizer.reads_special_tokens,
        "fields": {name: value for name, value in asdict(fields).items() if name != "missing_bytes"},
    }
    fields = replace(fields, missing_bytes=tokenizer.missing_bytes)
    try:
        with FileLock(folder / ".lock", timeout=0):
            check_new(prefix)
            done, sizes = _read_progress(folder, settings)
            chunks = _tokenise(_chunks(files, fields, skip, done), tokenizer, settings["held out"], workers, done)
            report(done)
            done = _write(chunks, prefix, tokenizer, domain, sizes, settings, report, may_be_empty=whole is not None)
        shutil.rmtree(folder, ignore_errors=True)  # now: NFS keeps the name of a lock that is open
        return done
    except Timeout:
        raise RunError(f"{folder} is in use: another process builds {prefix.name}; wait for it, or stop it.") from None
    except BaseException as error:
        if not (resumes := (folder / "progress.json").exists()):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # of a write
            then = "resumes" if resumes else "begins again"
            problem = f"output={prefix} cannot be written ({error.strerror})"
            raise RunError(f"{problem}; make room, and start again: the build {then}") from error
        raise


def _write(
    chunks: Iterator[tuple[list[np.ndarray], list[np.ndarray], Progress]],
    prefix: Path,
    tokenizer: Tokenizer,
    domain: str | None,
    sizes: dict[str, dict[str, int]],
    settings: dict[str, Any],
    report: Callable[[Progress], object],
    may_be_empty: bool,
) -> Progress:
    """Write all documents and record the progress from time to time."""
    folder, dtype = building(prefix), token_dtype(tokenizer.vocab_size)
    (aside := folder / "validation").mkdir(exist_ok=True)
    done, recorded = Progress(), time.monotonic()
    with (
        IndexedWriter(prefix, dtype, folder, sizes.get("training")) as writer,
        closing(IndexedWriter(aside, dtype, aside, sizes.get("validation"))) as held_out,
    ):
        for training, validation, done in chunks:
            for tokens in training:
                writer.add_document(tokens)
            for tokens in validation:
                held_out.add_document(tokens)
            report(done)
            if done.documents and time.monotonic() - recorded >= RECORD_SECONDS:
                positions = {"training": writer.position(), "validation": held_out.position()}
                write_json(folder / "progress.json", {"settings": settings, "sizes": positions, "done": asdict(done)})
                recorded = time.monotonic()
        for tokens in held_out.read_back():
            writer.add_document(tokens)
        held_out_tokens = held_out.position()["bin"] // dtype.itemsize
        if done.documents and min(held_out_tokens, done.tokens - held_out_tokens) < VALIDATION_TOKENS:
            done = replace(done, held_out=enough_held_out(writer.lengths(), done.held_out))
        if done.documents == 0 and not may_be_empty:
            raise RunError("input has no document that can be used; give other files, or the text_field of records")
        writer.sidecar = describe(prefix, tokenizer, domain, done.held_out, done.bytes)
    return done


def enough_held_out(lengths: np.ndarray, chosen: int) -> int:
    """Return how many documents, the last ones, are held out: more than the chosen ones if these have too few tokens.

    Args:
        lengths: tokens of each document, [N], N at least 1; one is left for training.
        chosen: number of documents chosen by hash.
    """
    tokens = np.cumsum(lengths[::-1], dtype=np.int64)  # of the last documents
    wanted = min(VALIDATION_TOKENS, tokens[-1] // 10)
    return min(max(chosen, 1 + int(np.searchsorted(tokens, wanted))), len(lengths) - 1)


def building(prefix: Path) -> Path:
    """Return the folder of an unfinished build."""
    return prefix.with_name(f"{prefix.name}.building")


def check_new(prefix: Path) -> None:
    """Check that no corpus of this name exists, except what a killed build has moved before its .idx."""
    parts = building(prefix)
    moved = (parts / "idx").exists() and not (parts / "bin").exists()
    for kind in ("idx",) if moved else ("idx", "bin", "json"):
        if Path(f"{prefix}.{kind}").exists():
            raise SettingError(f"output={prefix}: {prefix}.{kind} exists already; name another output, or delete it")


def _read_progress(folder: Path, settings: dict[str, Any]) -> tuple[Progress, dict[str, dict[str, int]]]:
    path = folder / "progress.json"
    if not path.exists():
        return Progress(), {}
    try:
        saved = json.loads(path.read_text())
        done = Progress(**saved["done"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): delete {folder} to begin again.") from error
    if differing := [name for name in settings if saved["settings"].get(name) != settings[name]]:
        problem = f"{folder} was started with other settings ({', '.join(differing)})"
        raise RunError(f"{problem}: give the same ones to resume it, name another output, or delete it.")
    return done, saved["sizes"]


def _chunks(
    files: Sequence[str], fields: Fields, skip: Skip | None, done: Progress
) -> Iterator[tuple[list[str], Progress]]:
    """Yield chunks of texts from `done` on, with the position behind each; `_tokenise` adds the counts of documents."""
    texts: list[str] = []
    size, left_out = 0, Counter(skipped=done.skipped, empty=done.empty)

    def count(line: str) -> None:
        left_out["skipped"] += 1
        assert skip is not None
        skip(line)

    for number in range(done.file, len(files)):
        start = done.number if number == done.file else 0
        counting = (skip and count, partial(left_out.update, ["empty"]))
        for record in read_documents(files[number], fields, WHOLE, start, *counting):
            assert isinstance(record.content, str)
            texts.append(record.content)
            size += len(record.content)
            if size >= CHUNK_CHARACTERS:
                yield texts, Progress(number, record.number + 1, **left_out)
                texts, size = [], 0
    yield texts, Progress(len(files), **left_out)


def _tokenise(
    chunks: Iterator[tuple[list[str], Progress]], tokenizer: Tokenizer, share: float, workers: int, done: Progress
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], Progress]]:
    """Yield each chunk's tokens by document, for training and held out, and the progress after it; in the order of the text."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each thread has a chunk of its own
    dtype = token_dtype(tokenizer.vocab_size)

    def encode(texts: list[str]) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        documents: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        contents = [text.encode() for text in texts]
        for content, ids in zip(contents, tokenizer.encode_batch(texts), strict=True):
            held_out = xxhash.xxh3_64_intdigest(content) < share * 2**64  # equal documents are in one split
            # With `struct`, twice as fast as `np.array`: what follows the tokenizer holds the GIL.
            closed = tokenizer.closed(ids)
            packed = struct.pack(f"{len(closed)}{dtype.char}", *closed)
            documents[held_out].append(np.frombuffer(packed, dtype))
        return *documents, sum(map(len, contents))

    queue: deque[tuple[Progress, Future[tuple[list[np.ndarray], list[np.ndarray], int]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(queue) < QUEUED * workers and (chunk := next(chunks, None)) is not None:
                queue.append((chunk[1], pool.submit(encode, chunk[0])))
            if not queue:
                return
            progress, future = queue.popleft()
            training, validation, size = future.result()
            done = replace(
                progress,
                documents=done.documents + len(training) + len(validation),
                bytes=done.bytes + size,
                tokens=done.tokens + sum(map(len, training)) + sum(map(len, validation)),
                held_out=done.held_out + len(validation),
            )
            yield training, validation, done
