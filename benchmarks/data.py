"""Reading a corpus while training on it: speed beside the tokenizer alone and beside tokens on disk, resuming, memory.

    python -m benchmarks.data [--rounds 9] [--only speed|loader|resume|memory|step]

The text is the pocket Pile's training text in one order, tokenised with GPT-2's tokenizer by one process on one thread.

    tokenizer    `encode_batch` of texts in memory, 16 at a time: nothing is read, nothing is packed
    text         `StreamedText`'s samples, from JSON lines compressed by zstd, plain, and from Parquet
    ids          the same from JSON lines and Parquet that hold token ids
    mapped       `PackedSource` over the same tokens in Megatron's format: what `nlgmoe prepare-data` leaves to be done

Loader: batches of 8 sequences from the data module, with so many data workers, while nothing is trained.

Candidates go on where they stopped, round by round. Resuming is measured late in the corpus: seconds until the first sample,
with the stream's cursor and without. Memory is the high-water mark of a process that reads the whole corpus and one of five
times its size; each stream holds a block of 50 documents.

Step: what a step of the quickstart waits for its batch, without data workers, of all that the step takes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.profilers import SimpleProfiler

from benchmarks.timing import ROOT, command_line, interleaved, settings
from nlgmoe.data import (
    Corpus,
    IndexedDataset,
    IndexedWriter,
    MegatronIndexed,
    PackedSource,
    PileDataModule,
    StreamedText,
    Tokenizer,
    TokenSource,
    load_tokenizer,
)
from nlgmoe.data.documents import MAX_DOCUMENT_BYTES, Fields, Shard, read_documents
from nlgmoe.data.indexed import token_dtype
from nlgmoe.data.pocket.build import open_corpus, read_texts, text_path
from nlgmoe.data.streaming.streams import StreamConfig, StreamedSource
from nlgmoe.experiment import load_config

DATA_DIR = Path("data/pocket_pile")
SEQ_LEN, STREAMS = 2048, 8
BUFFER = 50  # a stream reads about one block in a round
SAMPLES = 512  # in a round
STEPS = 60  # of the quickstart
PARTS = 8  # files of the corpus, so that each stream has one of its own


def corpus_texts() -> list[str]:
    manifest = open_corpus(DATA_DIR)
    texts = [text for domain in manifest.domains for text in read_texts(text_path(DATA_DIR, f"{domain}.train"))]
    random.Random(1).shuffle(texts)
    return texts


def write(folder: Path, name: str, records: list[dict[str, Any]], times: int = 1) -> list[str]:
    """Write the corpus in `PARTS` files of a format, so many times over; returns their names."""
    folder = folder / f"{name}.{times}"
    folder.mkdir()
    ending = "." + name.partition(" ")[2]
    for part in range(PARTS):
        path, chosen = folder / f"{part}{ending}", records[part::PARTS] * times
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(chosen), path, row_group_size=1000)
        elif ending == ".jsonl.zst":
            with pa.CompressedOutputStream(str(path), "zstd") as file:
                for record in chosen:
                    file.write(json.dumps(record).encode() + b"\n")
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in chosen))
    return sorted(map(str, folder.iterdir()))


def stream(files: list[str], tokenizer: Tokenizer, ids: bool) -> StreamedSource:
    fields = Fields(ids="input_ids" if ids else None, vocab_size=tokenizer.vocab_size)
    return StreamedSource(StreamConfig(files, fields, ["text"], tokenizer, STREAMS, BUFFER), SEQ_LEN, seed=1)


def reader(source: TokenSource) -> Callable[[], None]:
    indices = count()

    def read() -> None:
        for index in islice(indices, SAMPLES):
            source.sample(index)

    return read


def speed(folder: Path, texts: list[str], tokenizer: Tokenizer, rounds: int) -> dict[str, float]:
    """Tokens per second of each candidate."""
    tokens = [tokenizer.encode(text) for text in texts]
    text_records, id_records = [{"text": text} for text in texts], [{"input_ids": ids} for ids in tokens]
    candidates: dict[str, Callable[[], None]] = {}
    for ending in ("jsonl.zst", "jsonl", "parquet"):
        name = f"text {ending}"
        candidates[name] = reader(stream(write(folder, name, text_records), tokenizer, ids=False))
    for ending in ("jsonl.zst", "parquet"):
        name = f"ids {ending}"
        candidates[name] = reader(stream(write(folder, name, id_records), tokenizer, ids=True))
    with IndexedWriter(folder / "mapped", token_dtype(tokenizer.vocab_size)) as writer:
        for ids in tokens:
            writer.add_document([*ids, tokenizer.eod_id])
    candidates["mapped"] = reader(
        PackedSource([IndexedDataset(folder / "mapped").tokens], SEQ_LEN, tokenizer.eod_id, 1)
    )

    def batches() -> Iterator[tuple[list[str], int]]:
        for first in cycle(range(0, len(texts), 16)):
            yield texts[first : first + 16], sum(len(ids) + 1 for ids in tokens[first : first + 16])

    remaining, done = batches(), [0]

    def encode() -> None:
        until = done[0] + SAMPLES * SEQ_LEN
        while done[0] < until:
            batch, length = next(remaining)
            tokenizer.encode_batch(batch)
            done[0] += length

    candidates = {"tokenizer": encode, **candidates}
    seconds = interleaved(candidates, rounds)
    return {name: SAMPLES * SEQ_LEN / value for name, value in seconds.items()}


def loaders(folder: Path, texts: list[str], tokenizer: Tokenizer, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second of a data module's loader, by data workers and corpus."""
    texts_of = write(folder, "loaded jsonl", [{"text": text} for text in texts])
    ids_of = write(folder, "loaded parquet", [{"input_ids": tokenizer.encode(text)} for text in texts])
    with IndexedWriter(folder / "loaded", token_dtype(tokenizer.vocab_size)) as writer:
        for text in texts:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
    corpora: dict[str, Corpus] = {
        "text": StreamedText(str(Path(texts_of[0]).parent), evaluation_tokens=SEQ_LEN, **streamed(texts_of)),
        "ids": StreamedText(
            str(Path(ids_of[0]).parent), evaluation_tokens=SEQ_LEN, ids_field="input_ids", **streamed(ids_of)
        ),
        "mapped": MegatronIndexed(str(folder / "loaded"), (98, 2, 0)),
    }
    found = {}
    for workers in (0, 1, 2):
        candidates = {}
        for name, corpus in corpora.items():
            data = PileDataModule(
                str(DATA_DIR), "gpt2", corpus, micro_batch_size=8, seq_len=SEQ_LEN, num_workers=workers
            )
            data.prepare_data()
            data.setup()
            batches = iter(data.train_dataloader())
            candidates[name] = lambda batches=batches: [next(batches) for _ in range(SAMPLES // 8)]
        seconds = interleaved(candidates, rounds)
        found[f"{workers} workers"] = {name: SAMPLES * SEQ_LEN / value for name, value in seconds.items()}
    return found


def streamed(files: list[str]) -> dict[str, Any]:
    """Arguments of a streamed corpus: all files to train on, the first one to validate on."""
    names = [Path(file).name for file in files]
    return {"data_files": {"train": names, "validation": names[:1]}, "num_streams": STREAMS, "shuffle_buffer": BUFFER}


def passing_over(folder: Path, texts: list[str], rounds: int) -> float:
    """MB of text per second that a stream gets over which are other streams'."""
    files = write(folder, "shared jsonl.zst", [{"text": text} for text in texts])

    def read() -> None:
        for path in files:
            list(read_documents(path, Fields(), Shard(10**6, 10**6 + 1)))

    return sum(len(text.encode()) for text in texts) / 1e6 / interleaved({"read": read}, rounds)["read"]


def resuming(folder: Path, texts: list[str], tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """Seconds to the first sample, half way and nine tenths through the corpus."""
    found: dict[str, dict[str, float]] = {}
    for ending in ("jsonl.zst", "jsonl", "parquet"):
        files = write(folder, f"resumed {ending}", [{"text": text} for text in texts], times=5)
        through = sum(len(tokenizer.encode(text)) + 1 for text in texts[::PARTS]) * 5 // SEQ_LEN
        for share in (0.5, 0.9):
            index = int(through * share) * STREAMS  # of the first stream
            seconds = {}
            fresh = stream(files, tokenizer, ids=False)
            cursor = fresh.sample(index - STREAMS)["cursor"].tolist()
            for name, cursors in {"with its cursor": [cursor], "without": []}.items():
                source = stream(files, tokenizer, ids=False)
                source.seek(cursors)
                started = time.perf_counter()
                source.sample(index)
                seconds[name] = time.perf_counter() - started
            found[f"{ending}, {share:.0%}"] = seconds
    return found


def memory(folder: Path, texts: list[str], tokenizer: Tokenizer) -> dict[str, float]:
    """MB at most of a process that only loads the tokenizer, of those that read a corpus, and of one long document."""
    records = [{"text": text} for text in texts]
    long = {"text": "".join(texts)[: MAX_DOCUMENT_BYTES - 1_000_000].encode("ascii", "ignore").decode()}
    corpora = {
        "nothing": [],
        "the corpus": write(folder, "read jsonl.zst", records),
        "five times the corpus": write(folder, "read jsonl.zst", records, times=5),
        "the longest document": write(folder, "long jsonl.zst", [{"text": "short"}] * 7 + [long]),
    }
    found = {}
    for name, files in corpora.items():
        command = [sys.executable, "-m", "benchmarks.data", "--measured_child", *files]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def quickstart_step(folder: Path) -> dict[str, float]:
    """Median seconds of a step of configs/quickstart.yaml: for `next` of its loader, and for the rest."""
    profiler = SimpleProfiler()
    run = load_config(
        ROOT / "configs/quickstart.yaml",
        data__data_dir=str(DATA_DIR),
        model__train_tokens=None,
        trainer__max_steps=STEPS,
        trainer__default_root_dir=str(folder),
        trainer__logger=False,
        trainer__enable_progress_bar=False,
        trainer__callbacks=[],
        trainer__limit_val_batches=0,
    )
    run.trainer.profiler = profiler
    run.trainer.fit(run.module, run.data)
    parts = {"loader": "[_TrainingEpochLoop].train_dataloader_next", "rest": "run_training_batch"}
    return {
        part: statistics.median(profiler.recorded_durations[name][STEPS // 10 : STEPS]) for part, name in parts.items()
    }


def measured_child(files: list[str]) -> None:
    """Read all documents once, and print the high-water mark."""
    tokenizer = load_tokenizer("gpt2", DATA_DIR)
    source = stream(files, tokenizer, ids=False) if files else None
    reading = set(range(STREAMS)) if source is not None else set()
    for index in count():
        if not reading:
            break
        if index % STREAMS in reading and source.sample(index)["cursor"][2] > 0:  # the stream's first epoch is over
            reading.remove(index % STREAMS)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1e3)


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments = command_line(__doc__.splitlines()[0], "data", 9, ["speed", "loader", "resume", "memory", "step"])
    texts, tokenizer = corpus_texts(), load_tokenizer("gpt2", DATA_DIR)
    size = sum(len(text.encode()) for text in texts)
    output = Path(arguments.output)
    results: dict[str, Any] = json.loads(output.read_text()) if arguments.only and output.exists() else {}
    results |= {
        "settings": settings(
            rounds=arguments.rounds, bytes=size, documents=len(texts), seq_len=SEQ_LEN, streams=STREAMS, buffer=BUFFER
        )
    }
    print(json.dumps(results["settings"], indent=1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only in (None, "speed"):
            found = results["tokens_per_second"] = speed(folder, texts, tokenizer, arguments.rounds)
            print(f"\n{'':<18}{'tokens/s':>14}{'of the tokenizer':>18}")
            for label, value in found.items():
                print(f"{label:<18}{value:>14,.0f}{value / found['tokenizer']:>18.2f}", flush=True)
            results["passing_over_mb_per_second"] = passing_over(folder, texts, arguments.rounds)
            print(f"\npassing over the documents of other streams: {results['passing_over_mb_per_second']:.0f} MB/s")
        if arguments.only in (None, "loader"):
            results["loader_tokens_per_second"] = loaders(folder, texts, tokenizer, arguments.rounds)
            print("\nloader, tokens/s")
            for label, values in results["loader_tokens_per_second"].items():
                print(label, ", ".join(f"{name} {value:,.0f}" for name, value in values.items()), flush=True)
        if arguments.only in (None, "resume"):
            results["seconds_to_the_first_sample"] = resuming(folder, texts, tokenizer)
            print(f"\n{'':<18}{'with its cursor':>18}{'without':>12}   seconds to the first sample")
            for label, seconds in results["seconds_to_the_first_sample"].items():
                print(f"{label:<18}{seconds['with its cursor']:>18.3f}{seconds['without']:>12.2f}", flush=True)
        if arguments.only in (None, "memory"):
            results["peak_mb"] = memory(folder, texts, tokenizer)
            print(
                "\npeak memory: " + ", ".join(f"{label} {value:.0f} MB" for label, value in results["peak_mb"].items())
            )
        if arguments.only in (None, "step"):
            step = results["quickstart_step_seconds"] = quickstart_step(folder / "run")
            share = step["loader"] / sum(step.values())
            print(f"\na step of the quickstart: {sum(step.values()):.3f} s, {share:.2%} of it for the loader")
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured_child"]:
        measured_child(sys.argv[2:])
    else:
        main()
