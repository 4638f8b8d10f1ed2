"""Text to tokens on disk: `nlgmoe prepare-data` beside `datasets.map` with the same tokenizer and as many processes.

    python -m benchmarks.prepare_data [--megabytes 1000] [--workers 2] [--rounds 2]

The text is the pocket Pile's training text, in another order each time over, in one file of JSON lines; the tokenizer is
GPT-2's. Both are whole processes, in turn, from the file to tokens on disk: `datasets` first makes its own copy of the text.
Seconds are medians; memory is the largest sum over a process and its workers of what they hold alone, and
of their share of what they share (`Pss`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.data import corpus_texts
from benchmarks.timing import ROOT, settings
from nlgmoe.data.tokenizer import load_tokenizer
from tests.processes import processes_of_group

DATA = ROOT / "data/pocket_pile"
MAP = """
import sys
from datasets import load_dataset
from transformers import PreTrainedTokenizerFast
file, tokenizer, cache, workers = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer)
def encode(batch):
    return {"input_ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]}
data = load_dataset("json", data_files=file, split="train", cache_dir=cache)
data.map(encode, batched=True, batch_size=64, num_proc=int(workers), remove_columns=["text"])
"""


def write_text(file: Path, megabytes: int) -> dict[str, int]:
    """Write JSON lines of so much text; returns its bytes and documents."""
    texts, size, documents, draw = corpus_texts(), 0, 0, random.Random(0)
    with file.open("w") as lines:
        while size < megabytes * 1e6:
            draw.shuffle(texts)
            for text in texts:
                lines.write(json.dumps({"text": text}) + "\n")
                size, documents = size + len(text.encode()), documents + 1
    return {"bytes": size, "documents": documents}


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; returns its seconds and its largest memory in MB."""
    started, peak = time.perf_counter(), 0.0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(1):
                peak = max(peak, memory_of_group(run.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        error = run.communicate()[1].decode()
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
    assert run.returncode == 0, error[-3000:]
    return seconds, peak


def memory_of_group(group: int) -> float:
    """MB of the processes of a group."""
    total = 0.0
    for process in processes_of_group(group):
        with suppress(OSError):  # it has just ended
            rollup = (process / "smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1e3
    return total


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", default=str(ROOT / "docs/results/prepare_data.json"))
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"nlgmoe prepare-data": [], "datasets.map": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = write_text(folder / "text.jsonl", options.megabytes)
        (folder / "tokenizer.json").write_text(load_tokenizer("gpt2", DATA).to_json())
        for turn in range(options.rounds):
            prepare = [
                "nlgmoe",
                "prepare-data",
                f"--input={folder / 'text.jsonl'}",
                f"--output={folder / f'ours{turn}'}",
            ]
            prepare += ["--tokenizer=gpt2", f"--data_dir={DATA}", f"--workers={options.workers}"]
            mapped = [str(folder / "text.jsonl"), str(folder / "tokenizer.json"), str(folder / f"cache{turn}")]
            found["nlgmoe prepare-data"].append(measure([sys.executable, "-m", *prepare]))
            found["datasets.map"].append(measure([sys.executable, "-c", MAP, *mapped, str(options.workers)]))
            print({candidate: runs[-1] for candidate, runs in found.items()}, flush=True)
    result: dict[str, Any] = {
        "settings": settings(**text, workers=options.workers, rounds=options.rounds),
        **{
            candidate: {"seconds": statistics.median(run[0] for run in runs), "peak_mb": max(run[1] for run in runs)}
            for candidate, runs in found.items()
        },
    }
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    for candidate in found:
        print(f"{candidate:<20} {result[candidate]['seconds']:6.0f} s {result[candidate]['peak_mb']:6.0f} MB")


if __name__ == "__main__":
    main()
