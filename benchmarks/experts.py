"""Costs of looking inside a mixture: a trace, first-order changes, their memory. 10 minutes.

    python -m benchmarks.experts

The model is the quickstart's PR-MoE, untrained: 10.2M parameters, 3 MoE layers of 16, 16 and 32 experts, sequences of 128 tokens.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Benchmark, Part, Table, interleaved
from nlgmoe.batch import Batch
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.device import resident_bytes
from nlgmoe.eval.causes import first_order
from nlgmoe.eval.perplexity import CHUNK, batch_losses
from nlgmoe.eval.trace import TraceFacts, TraceWriter
from nlgmoe.experiment import parse_config
from nlgmoe.model.gpt import GPT

LENGTH, SEQUENCES = 128, 32  # tokens of a sequence, sequences of a batch
MANY = (1_000_000, 10_000_000)  # tokens of the tiny model whose memory is compared


def quickstart() -> GPT:
    settings = parse_config("configs/quickstart.yaml")["model"]["config"]
    return GPT(GPTConfig.from_dict(settings)).eval()


def batch_of(vocab_size: int) -> Batch:
    tokens = torch.randint(vocab_size, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        token_mask=mask,
        domain=torch.zeros(SEQUENCES).long(),
        padded=False,
    )


def costs(rounds: int) -> dict[str, float]:
    """Return the median seconds of a batch."""
    model = quickstart()
    batch = batch_of(model.config.vocab_size)
    with (
        tempfile.TemporaryDirectory() as folder,
        TraceWriter(Path(folder) / "trace", TraceFacts.of(model.config, ["all"]), 0) as writer,
    ):

        @torch.no_grad()
        def loss() -> Any:
            return batch_losses(model, batch, CHUNK)

        @torch.no_grad()
        def trace() -> None:
            writer.add(batch, batch_losses(model, batch, CHUNK)[1])

        candidates = {"forward": loss, "trace": trace, "first order": lambda: first_order(model, [batch], writer.add)}
        return interleaved(candidates, rounds)


def costs_table(measured: dict[str, float]) -> Table:
    tokens = SEQUENCES * LENGTH
    rows = [
        [name, f"{1000 * seconds:.0f}", f"{seconds / measured['forward']:.2f}", f"{seconds * 1e6 / tokens / 60:.1f}"]
        for name, seconds in measured.items()
    ]
    return (f"a batch of {tokens:,} tokens", "ms", "forward passes", "minutes for 1M tokens"), rows


def peaks(_: int) -> dict[str, float]:
    """Return the peak memory, in MB, of processes that read many tokens."""
    measured = {}
    for kind, read, tokens in (
        ("tiny", "trace", MANY[0]),
        ("tiny", "trace", MANY[1]),
        ("quickstart", "first order", MANY[0]),
    ):
        words = [sys.executable, "-m", "benchmarks.experts", "--measure", kind, str(tokens)]
        printed = subprocess.run(words, check=True, capture_output=True).stdout
        measured[f"{kind}, {read}, {tokens:,} tokens"] = float(printed)
    return measured


def peaks_table(measured: dict[str, float]) -> Table:
    return ("process", "peak (MB)"), [[name, f"{megabytes:,.0f}"] for name, megabytes in measured.items()]


def measure(kind: str, tokens: int) -> None:
    """Read `tokens` tokens in this process, and print its peak memory."""
    tiny = GPTConfig(256, LENGTH, 2, 16, 2, moe=MoEConfig(4))
    model = GPT(tiny).eval() if kind == "tiny" else quickstart()
    batch = batch_of(model.config.vocab_size)

    def batches() -> Iterator[Batch]:
        for _ in range(tokens // batch["tokens"].numel()):
            yield batch

    with (
        tempfile.TemporaryDirectory() as folder,
        TraceWriter(Path(folder) / "trace", TraceFacts.of(model.config, ["all"]), 0) as writer,
    ):
        if kind == "tiny":
            with torch.no_grad():
                for text in batches():
                    writer.add(text, model(text["tokens"]).routings)
        else:
            first_order(model, batches(), writer.add)
    print(resident_bytes() / 1e6)


PARTS = {"costs": Part(costs, costs_table, rounds=15), "memory": Part(peaks, peaks_table)}
BENCHMARK = Benchmark("experts", "experts.md", PARTS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        BENCHMARK.run(__doc__ or "")
