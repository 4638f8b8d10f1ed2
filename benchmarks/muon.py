"""What Muon costs: whole training steps beside AdamW's, and small matrices that are multiplied together. 4 minutes.

    python -m benchmarks.muon

`steps` takes the steps of three configurations on their text, with AdamW and with Muon in turn, on one thread. `stacked` takes
five Newton-Schulz steps in bf16 of all matrices of a model, where matrices of one shape are multiplied together up to so many
values; `STACKED` of nlgmoe/optim/muon.py is the limit in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.step import whole_step
from benchmarks.timing import Benchmark, Part, Table, interleaved
from nlgmoe import load_config
from nlgmoe.model.gpt import GPT
from nlgmoe.optim import muon
from nlgmoe.optim.optimizer import muon_matrices

MODELS = {
    "gate's baseline": ["configs/reproduce/base.yaml", "configs/reproduce/moe_16.yaml"],
    "quickstart": ["configs/quickstart.yaml"],
    "pr_moe/laptop": ["configs/pr_moe/laptop.yaml"],
}
LIMITS = (1, 2**14, 2**16, 2**18, 2**20, 2**22)  # values


def steps(rounds: int) -> dict[str, dict[str, float]]:
    """Return the seconds of a step by model and optimizer."""
    measured = {}
    for name, files in MODELS.items():
        candidates = {"AdamW": whole_step(files, model__optimizer__muon=None)}
        candidates["Muon"] = whole_step(files, model__optimizer__muon={})
        measured[name] = interleaved(candidates, rounds, 8)
    return measured


def steps_table(measured: dict[str, dict[str, float]]) -> Table:
    rows: list[Any] = [
        [name, *(f"{1e3 * row[kind]:.0f}" for kind in ("AdamW", "Muon")), f"{row['Muon'] / row['AdamW']:.2f}"]
        for name, row in measured.items()
    ]
    return ["step", "AdamW, ms", "Muon, ms", "Muon / AdamW"], rows


def stacked(rounds: int) -> dict[str, dict[str, float]]:
    """Return the seconds of Newton-Schulz by model and limit."""

    def run(matrices: list[torch.Tensor], limit: int) -> Callable[[], None]:
        def step() -> None:
            with patch.object(muon, "STACKED", limit):
                for batch in muon.batches([matrix.shape for matrix in matrices]):
                    muon.orthogonalise([matrices[index] for index in batch], muon.MuonConfig())

        return step

    measured = {}
    for name, files in MODELS.items():
        with torch.random.fork_rng([]):
            matrices = [torch.randn(w.shape) for w in muon_matrices(GPT(load_config(files).module.config)).values()]
        measured[name] = interleaved({str(limit): run(matrices, limit) for limit in LIMITS}, rounds, 2)
    return measured


def stacked_table(measured: dict[str, dict[str, float]]) -> Table:
    rows: list[Any] = [[name, *(f"{1e3 * row[str(limit)]:.1f}" for limit in LIMITS)] for name, row in measured.items()]
    return ["ms, values multiplied together", "each alone", *(f"{limit:,}" for limit in LIMITS[1:])], rows


BENCHMARK = Benchmark(
    "muon", "performance.md", {"steps": Part(steps, steps_table, 25, 1), "stacked": Part(stacked, stacked_table, 7, 1)}
)

if __name__ == "__main__":
    BENCHMARK.run(__doc__)
