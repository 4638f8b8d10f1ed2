"""Convert text files to one corpus in Megatron's indexed format.

Threads tokenise chunks of text, since the tokenizer releases the GIL. Tokens are written in the order of the text; documents held
out for validation, chosen by hash, come last. The result does not depend on the number of threads.

    PREFIX.building/bin, lengths         the tokens so far, and the data of their index
    PREFIX.building/validation           the same of the documents held out

PREFIX.bin, PREFIX.json and PREFIX.idx appear when the build is done. What a killed build leaves is overwritten by the next one.
"""

import os
import shutil
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from nlgmoe.data.documents import Fields, Skip, read_documents
from nlgmoe.data.indexed import IndexedWriter, token_dtype
from nlgmoe.data.prefix import describe
from nlgmoe.data.source_files import describe_file, is_local
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.validation import RunError, SettingError

CHUNK_CHARACTERS = 1 << 18  # tokenised together; the tokenizer needs a hundred times as much memory
QUEUED = 3  # chunks per thread that are read ahead
SMALL_BYTES = 5_000_000  # of files, below which more is held out
HELD_OUT, HELD_OUT_OF_SMALL = 0.02, 0.1  # shares of the documents
VALIDATION_TOKENS = 2048  # at least, of a small corpus a tenth: a sequence of the paper's models


@dataclass(frozen=True)
class Progress:
    """Progress of a build."""

    file: int = 0  # index of the input file that is being read; after the last one, their number
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
    # Some servers report no size: such files are taken as large.
    size = sum(describe_file(file).bytes or (0 if is_local(file) else SMALL_BYTES) for file in whole or files)
    share = HELD_OUT if size >= SMALL_BYTES else HELD_OUT_OF_SMALL
    fields = replace(fields, missing_bytes=tokenizer.missing_bytes)
    try:
        with FileLock(folder / ".lock", timeout=0):
            check_new(prefix)
            for kind in ("bin", "json"):  # of a killed build, or `check_new` had refused them
                Path(f"{prefix}.{kind}").unlink(missing_ok=True)
            chunks = _tokenise(_chunks(files, fields, skip), tokenizer, share, workers)
            report(Progress())
            done = _write(chunks, prefix, tokenizer, domain, report, may_be_empty=whole is not None)
        shutil.rmtree(folder, ignore_errors=True)  # now: NFS keeps the name of a lock that is open
        return done
    except Timeout:
        raise RunError(f"{folder} is in use: another process builds {prefix.name}; wait for it, or stop it.") from None
    except BaseException as error:
        if not _has_moved_files(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # of a write
            raise RunError(
                f"output={prefix} cannot be written ({error.strerror}); make room, and start again"
            ) from error
        raise


def _write(
    chunks: Iterator[tuple[list[np.ndarray], list[np.ndarray], Progress]],
    prefix: Path,
    tokenizer: Tokenizer,
    domain: str | None,
    report: Callable[[Progress], object],
    may_be_empty: bool,
) -> Progress:
    folder, dtype = building(prefix), token_dtype(tokenizer.vocab_size)
    (aside := folder / "validation").mkdir(exist_ok=True)
    done, held_out_tokens = Progress(), 0
    with IndexedWriter(prefix, dtype, folder) as writer, closing(IndexedWriter(aside, dtype, aside)) as held_out:
        for training, validation, done in chunks:
            for tokens in training:
                writer.add_document(tokens)
            for tokens in validation:
                held_out.add_document(tokens)
                held_out_tokens += len(tokens)
            report(done)
        writer.append(held_out)
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
    for kind in ("idx",) if _has_moved_files(building(prefix)) else ("idx", "bin", "json"):
        if Path(f"{prefix}.{kind}").exists():
            raise SettingError(f"output={prefix}: {prefix}.{kind} exists already; name another output, or delete it")


def _has_moved_files(folder: Path) -> bool:
    """Return whether the build of this folder ended between its first move and that of the .idx."""
    return (folder / "idx").exists() and not (folder / "bin").exists()


def _chunks(files: Sequence[str], fields: Fields, skip: Skip | None) -> Iterator[tuple[list[str], Progress]]:
    """Yield chunks of texts, with the progress behind each; `_tokenise` adds the counts of documents."""
    texts: list[str] = []
    size, left_out = 0, Counter[str]()

    def count(line: str) -> None:
        left_out["skipped"] += 1
        assert skip is not None
        skip(line)

    count_empty = partial(left_out.update, ["empty"])
    for number, file in enumerate(files):
        for record in read_documents(file, fields, skip=skip and count, count_empty=count_empty):
            texts.append(record.content)
            size += len(record.content)
            if size >= CHUNK_CHARACTERS:
                yield texts, Progress(number, **left_out)
                texts, size = [], 0
    yield texts, Progress(len(files), **left_out)


def _tokenise(
    chunks: Iterator[tuple[list[str], Progress]], tokenizer: Tokenizer, share: float, workers: int
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

    done = Progress()
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
