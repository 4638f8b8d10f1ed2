"""What a large corpus in Megatron's format costs: to open, to read samples of, in memory; and to make from text.

    python -m benchmarks.indexed_data [--tokens 10_000_000 1_000_000_000] [--workers 1 2] [--rounds 3] [--folder FOLDER]

Corpora are the pocket Pile's training text in GPT-2's tokens, over and over, up to so many tokens. Each is opened in a fresh
process: index and samples of the tokens are checked, then samples of 2,048 tokens are read, all over the corpus. Files have
just been written and come from the page cache. Memory of a process is `anonymous`, which is its own, and `mapped`, pages of
files that are shared by all processes and given back when memory is short.

Making one: `prepare-data`'s build with so many threads, beside the tokenizer alone on text in memory, on one thread and on
all of them; rounds alternate, numbers are medians. Where other programs run too, tokens for each second of CPU time are what
counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import ROOT, settings
from nlgmoe.data.build_indexed import build_indexed
from nlgmoe.data.documents import Fields
from nlgmoe.data.indexed import IndexedDataset, IndexedWriter
from nlgmoe.data.permutation import Permutation
from nlgmoe.data.pocket.build import read_texts
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer

DATA = ROOT / "data" / "pocket_pile"
SAMPLES = 2_000
SEQUENCES = 20_000_000  # of an index that is opened by itself


def memory() -> dict[str, float]:
    """Resident MB of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {name: int(fields[field].split()[0]) / 1000 for name, field in names.items()}


def open_and_read(prefix: str) -> dict[str, Any]:
    """Of a fresh process: seconds to open and to the first batch, microseconds a sample, MB above what the libraries take."""
    from nlgmoe.data import MegatronIndexed, PileDataModule

    data = PileDataModule(str(DATA), "gpt2", MegatronIndexed(prefix, (98, 2, 0)), seq_len=2048, micro_batch_size=8)
    load_tokenizer("gpt2", DATA)
    before, started = memory(), time.perf_counter()
    data.setup()
    opened = time.perf_counter()
    next(iter(data.train_dataloader()))
    first_batch = time.perf_counter()
    source = data._opened().training_source(2048, 1234)
    begun = time.perf_counter()
    for index in range(SAMPLES):
        source.sample(index)
    sample = (time.perf_counter() - begun) / SAMPLES
    order = Permutation(146_000_000, 1234, "epoch", 0)
    begun = time.perf_counter()
    for index in range(SAMPLES):
        order[index]
    place = (time.perf_counter() - begun) / SAMPLES
    return {
        "open_seconds": opened - started,
        "first_batch_seconds": first_batch - started,
        "sample_microseconds": 1e6 * sample,
        "place_in_the_order_microseconds": 1e6 * place,
        **{f"{name}_mb": value - before[name] for name, value in memory().items()},
    }


def write_corpus(prefix: Path, tokens: int, made: Path) -> int:
    """Repeat a corpus until it has so many tokens; the number of documents."""
    source, documents, written = IndexedDataset(made), 0, 0
    with IndexedWriter(prefix, source.dtype) as writer:
        while written < tokens:
            document = source[documents % len(source)]
            writer.add_document(document)
            documents, written = documents + 1, written + len(document)
    return documents


def open_index(folder: Path) -> dict[str, float]:
    """Seconds to open an index of many short sequences."""
    with IndexedWriter(folder / "index", np.dtype(np.uint8)) as writer:
        for _ in range(SEQUENCES // 10_000):
            writer.add_document(np.zeros(10_000, np.uint8), [1] * 10_000)
    started = time.perf_counter()
    IndexedDataset(folder / "index")
    seconds = time.perf_counter() - started
    for kind in ("bin", "idx"):
        (folder / f"index.{kind}").unlink()
    return {"sequences": SEQUENCES, "open_seconds": seconds}


def making(tokenizer: Tokenizer, files: list[str], workers: list[int], rounds: int, folder: Path) -> dict[str, Any]:
    """Tokens and MB a second of builds and of the tokenizer alone."""
    texts = [text for file in files for text in read_texts(Path(file))]
    size = sum(len(text.encode()) for text in texts)

    def alone(threads: bool) -> int:
        os.environ["TOKENIZERS_PARALLELISM"] = str(threads).lower()
        return sum(
            len(ids) + 1 for i in range(0, len(texts), 256) for ids in tokenizer.encode_batch(texts[i : i + 256])
        )

    def build(count: int) -> int:
        shutil.rmtree(folder / "made", ignore_errors=True)
        prefix = folder / "made" / "pile"
        return build_indexed(files, prefix, tokenizer, Fields(), count, lambda done: None).tokens

    candidates: dict[str, Callable[[], int]] = {
        "tokenizer alone, one thread": lambda: alone(False),
        "tokenizer alone, all threads": lambda: alone(True),
        **{f"prepare-data, {count} workers": lambda count=count: build(count) for count in workers},
    }
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    computing: dict[str, list[float]] = {name: [] for name in candidates}
    tokens = 0
    for _ in range(rounds):
        for name, candidate in candidates.items():
            started, computed = time.perf_counter(), cpu_seconds()
            tokens = candidate()
            wall[name].append(time.perf_counter() - started)
            computing[name].append(cpu_seconds() - computed)
    return {
        "text_mb": size / 1e6,
        "tokens": tokens,
        **{
            name: {
                "tokens_per_s": tokens / statistics.median(wall[name]),
                "tokens_per_cpu_s": tokens / statistics.median(computing[name]),
                "mb_per_cpu_s": size / 1e6 / statistics.median(computing[name]),
            }
            for name in candidates
        },
    }


def cpu_seconds() -> float:
    """That this process and those it has waited for have computed."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000_000, 1_000_000_000], help="sizes of corpora")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads that tokenise")
    parser.add_argument("--rounds", type=int, default=3, help="times each way of making a corpus is run")
    parser.add_argument("--folder", default=None, help="where the corpora go; needs 2 bytes a token")
    parser.add_argument("--output", default=str(ROOT / "docs/results/indexed_data.json"), help="where the JSON goes")
    parser.add_argument("--opened", help=argparse.SUPPRESS)  # what the fresh processes are started with
    arguments = parser.parse_args()
    if arguments.opened:
        print(json.dumps(open_and_read(arguments.opened)))
        return
    tokenizer = load_tokenizer("gpt2", DATA)
    files = [str(file) for file in sorted((DATA / "text").glob("*.train.jsonl"))]
    results: dict[str, Any] = {"settings": settings(rounds=arguments.rounds, samples=SAMPLES, cores=os.cpu_count())}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        results["making"] = making(tokenizer, files, arguments.workers, arguments.rounds, folder)
        print(json.dumps(results["making"], indent=1), flush=True)
        results["index"] = open_index(folder)
        print(json.dumps(results["index"]), flush=True)
        for tokens in arguments.tokens:
            prefix = folder / "corpus"
            documents = write_corpus(prefix, tokens, folder / "made" / "pile")
            command = [sys.executable, "-m", "benchmarks.indexed_data", "--opened", str(prefix)]
            runs = [json.loads(subprocess.check_output(command, cwd=ROOT)) for _ in range(arguments.rounds)]
            row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            results[f"{tokens:,} tokens"] = {"documents": documents, **row}
            print(f"{tokens:,} tokens", json.dumps(results[f"{tokens:,} tokens"]), flush=True)
    Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
