"""Speed of reading data: tokens a second from the data module's loader, without training; of preparing and opening it. 3 minutes.

    python -m benchmarks.data

Batches of 8 sequences of 2,048 tokens by corpus and data workers, beside `encode_batch` of texts in memory. The text is the
pocket Pile's training text in one order, the tokenizer GPT-2's. A stream holds a block of 50 documents. Files have just been
written, and come from the page cache. `prepare-data` turns 6 MB of it, as JSON lines, into tokens on disk; what it does beside
tokenising holds the interpreter's lock, so that threads do not divide it; shards, each of a process, do. `opening` checks the
index of 10 million documents (`prepare`), and opens 1,000 prefixes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.timing import ROOT, Benchmark, Part, Table, interleaved
from nlgmoe.data import (
    Corpus,
    IndexedDataset,
    IndexedWriter,
    MegatronIndexed,
    PileDataModule,
    StreamedText,
    Tokenizer,
    load_tokenizer,
)
from nlgmoe.data.build_indexed import build_indexed
from nlgmoe.data.documents import Fields
from nlgmoe.data.indexed import token_dtype
from nlgmoe.data.pocket_build import open_corpus, read_texts, text_path
from nlgmoe.data.prefix import describe
from nlgmoe.data.source_files import part_of

DATA = ROOT / "data/pocket_pile"
SEQ_LEN, BATCH, BATCHES, WORKERS = 2048, 8, 64, (0, 1, 2)
PREPARED_BYTES = 6_000_000  # of text
DOCUMENTS, PREFIXES = 10_000_000, 1000
STREAMS, BUFFER = 8, 50  # as many files as streams, so that each has one of its own


def corpus_texts() -> list[str]:
    """Return the documents of the pocket Pile, shuffled."""
    domains = open_corpus(DATA).domains
    texts = [text for domain in domains for text in read_texts(text_path(DATA, f"{domain}.train"))]
    random.Random(1).shuffle(texts)
    return texts


def write_files(folder: Path, ending: str, records: list[dict[str, Any]]) -> Path:
    """Write records in `STREAMS` files of a format, and some for validation; returns their folder."""
    folder.mkdir()
    parts = {f"{part}": records[part::STREAMS] for part in range(STREAMS)}
    for name, chosen in (parts | {"validation": records[:20]}).items():
        path = folder / f"{name}.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(chosen), path, row_group_size=1000)
        else:
            with pa.CompressedOutputStream(str(path), "zstd") as file:
                file.write("".join(json.dumps(record) + "\n" for record in chosen).encode())
    return folder


def streamed(folder: Path) -> StreamedText:
    """Return a stream of the files."""
    *names, validation = sorted(path.name for path in folder.iterdir())
    files = {"train": names, "validation": validation}
    sizes = {"num_streams": STREAMS, "shuffle_buffer": BUFFER, "evaluation_tokens": SEQ_LEN}
    return StreamedText(str(folder), data_files=files, **sizes)


def reading(rounds: int) -> dict[str, dict[str, float]]:
    """Return tokens per second by corpus and number of workers; in each round a candidate continues where it stopped."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts, tokenizer, wanted = corpus_texts(), load_tokenizer("gpt2", DATA), BATCHES * BATCH * SEQ_LEN
    groups = cycle(range(0, len(texts), 16))
    encoded = 0

    def encode() -> None:
        nonlocal encoded
        while encoded < wanted:
            first = next(groups)
            encoded += sum(len(tokens) + 1 for tokens in tokenizer.encode_batch(texts[first : first + 16]))
        encoded -= wanted

    measured = {"the tokenizer alone": {"0": wanted / interleaved({"": encode}, rounds)[""]}}
    with TemporaryDirectory() as name:
        folder = Path(name)
        with IndexedWriter(folder / "indexed", token_dtype(tokenizer.vocab_size)) as writer:
            for text in texts:
                writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
        by_text = [{"text": text} for text in texts]
        corpora: dict[str, Corpus] = {
            "text, `.jsonl.zst`": streamed(write_files(folder / "text", "jsonl.zst", by_text)),
            "text, `.parquet`": streamed(write_files(folder / "text parquet", "parquet", by_text)),
            "the indexed format": MegatronIndexed(str(folder / "indexed"), (98, 2, 0)),
        }
        for workers in WORKERS:
            candidates: dict[str, Callable[[], object]] = {}
            for corpus, source in corpora.items():
                options = {"micro_batch_size": BATCH, "seq_len": SEQ_LEN, "num_workers": workers}
                data = PileDataModule(str(DATA), "gpt2", source, **options)
                data.prepare_data()
                data.setup()
                batches = iter(data.train_dataloader())
                candidates[corpus] = lambda batches=batches: list(islice(batches, BATCHES))
            for corpus, seconds in interleaved(candidates, rounds).items():
                measured.setdefault(corpus, {})[str(workers)] = wanted / seconds
    return measured


def reading_table(measured: dict[str, dict[str, float]]) -> Table:
    rows = [
        [corpus, *(f"{speed[str(n)] / 1e6:,.2f}" if str(n) in speed else None for n in WORKERS)]
        for corpus, speed in measured.items()
    ]
    return ["million tokens/s", *(f"`num_workers` {n}" for n in WORKERS)], rows


class Replayed:
    """The backend of a tokenizer that returns at once what it has returned before: a build's own time remains."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._known: dict[int, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> list[Any]:
        """Return the encodings of these texts, tokenised the first time alone."""
        key = hash(tuple(texts))
        if key not in self._known:
            self._known[key] = self._backend.encode_batch_fast(texts, **options)
        return self._known[key]


def preparing(rounds: int) -> dict[str, dict[str, float]]:
    """Return seconds for a MB of text by threads, and the CPU seconds of all but the tokenizer, which hold the GIL."""
    tokenizer, measured = load_tokenizer("gpt2", DATA), dict[str, dict[str, float]]()
    with TemporaryDirectory() as name:
        paths = [str(Path(name) / f"{number}.jsonl") for number in range(8)]
        texts = corpus_texts()
        texts = texts[: len(texts) * PREPARED_BYTES // sum(map(len, texts))]
        for number, path in enumerate(paths):
            Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number :: len(paths)]))
        size = sum(len(text.encode()) for text in texts) / 1e6
        numbers = count()

        def build(used: Tokenizer, threads: int, shard: str = "1/1") -> None:
            files, suffix = part_of(paths, shard)
            build_indexed(files, Path(name) / f"{next(numbers)}{suffix}", used, Fields(), threads, lambda done: None)

        def build_shards(processes: int) -> None:
            shards = [f"{number + 1}/{processes}" for number in range(processes)]
            started = [
                multiprocessing.get_context("fork").Process(target=build, args=(tokenizer, 1, s)) for s in shards
            ]
            next(numbers)  # each process has a copy of the count
            for process in started:
                process.start()
            for process in started:
                process.join()
                assert process.exitcode == 0

        for threads in (1, 2):
            seconds = interleaved({"": partial(build, tokenizer, threads)}, rounds, 1)[""] / size
            measured[str(threads)] = {"seconds": seconds}
        seconds = interleaved({"": partial(build_shards, 2)}, rounds, 1)[""] / size
        measured["shards"] = {"seconds": seconds}
        replayed = copy(tokenizer)
        replayed._backend = Replayed(tokenizer._backend)
        build(replayed, 1)
        held = []
        for _ in range(max(3, rounds)):
            started = time.process_time()
            build(replayed, 1)
            held.append((time.process_time() - started) / size)
        measured["GIL"] = {"seconds": statistics.median(held)}
    return measured


def preparing_table(measured: dict[str, dict[str, float]]) -> Table:
    labels = {
        "1": "1 thread",
        "2": "2 threads",
        "shards": "2 shards, processes of 1 thread",
        "GIL": "the part that holds the GIL, CPU seconds",
    }
    rows = [
        [labels[name], f"{values['seconds']:.4f}", f"{3.6 / values['seconds']:,.1f}"]
        for name, values in measured.items()
    ]
    return ["`prepare-data`", "seconds a MB", "GB an hour, at most"], rows


def opening(rounds: int) -> dict[str, float]:
    """Return nanoseconds a document to check an index, and seconds to check and to open a corpus of many prefixes."""
    tokenizer = load_tokenizer("pocket-4k", DATA)
    documents = [[*tokenizer.encode(text[:1000]), tokenizer.eod_id] for text in corpus_texts()[:200]]
    with TemporaryDirectory() as name:
        folder = Path(name)
        with IndexedWriter(folder / "long", token_dtype(tokenizer.vocab_size)) as writer:
            for _ in range(DOCUMENTS):
                writer.add_document([tokenizer.eod_id])
        for number in range(1, PREFIXES + 1):
            prefix = folder / f"many-{number}-of-{PREFIXES}"
            with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
                for document in range(30):
                    writer.add_document(documents[(number + document) % len(documents)])
                writer.sidecar = describe(prefix, tokenizer, held_out=1)
        long, corpus = IndexedDataset(folder / "long"), MegatronIndexed(str(folder / "many"))
        candidates: dict[str, Callable[[], object]] = {
            "check": long.check,
            "prepare": lambda: corpus.prepare(DATA, "pocket-4k"),
            "open": lambda: corpus.open(DATA, "pocket-4k"),
        }
        seconds = interleaved(candidates, rounds)
    return {
        "check the index, ns a document": seconds["check"] / DOCUMENTS * 1e9,
        f"prepare {PREFIXES:,} prefixes, s": seconds["prepare"],
        f"open {PREFIXES:,} prefixes, s": seconds["open"],
    }


def opening_table(measured: dict[str, float]) -> Table:
    return ["", "measured"], [[name, f"{value:.2f}"] for name, value in measured.items()]


PARTS = {
    "reading": Part(reading, reading_table, 5),
    "preparing": Part(preparing, preparing_table, 3),
    "opening": Part(opening, opening_table, 5),
}
BENCHMARK = Benchmark("data", "data.md", PARTS)

if __name__ == "__main__":
    BENCHMARK.run(__doc__)
