"""What users run on their GPUs first, at tiny shapes on two processes of a CPU."""

from pathlib import Path

import torch
from torch import distributed

from benchmarks.ranks import measure, wrong
from tests.support.spawn import spawn


def on_the_cpu() -> dict[str, float]:
    distributed.init_process_group("gloo")
    return measure(torch.device("cpu"), tiny=True)


def test_ranks_benchmark_measures_and_finds_nothing_wrong(tmp_path: Path) -> None:
    for figures in spawn(2, on_the_cpu, folder=tmp_path):
        assert len(figures) == 4 and all(value > 0 for value in figures.values())
        assert wrong(figures) == []
