"""Settings, errors and results of commands."""

import csv
import os
import subprocess
from pathlib import Path

import pytest

from nlgmoe.commands.main import main
from tests.support.processes import ROOT, python


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code in (1, 2) and len(lines) == 1, lines
    assert "unexpected" not in lines[0]
    return lines[0]


WIDTHS = ["--model.config.hidden_size=32", "--model.config.seq_len=32", "--model.config.num_heads=2"]
TINY = [
    *WIDTHS,
    "--model.config.ffn_hidden_size=128",
    "--model.config.num_layers=2",
    "--model.config.moe.num_experts=[4]",
    "--data.max_eval_windows=4",
    "--data.micro_batch_size=2",
    "--model.schedule.warmup_tokens=64",
    "--trainer.val_check_interval=4",
    "--trainer.log_every_n_steps=2",
]


def quickstart(run: Path, *extra: str) -> list[str]:
    samples = "--trainer.callbacks.init_args.max_new_tokens=8"  # of the last callback in the file
    config = str(ROOT / "configs/quickstart.yaml")
    return ["--config", config, *TINY, f"--trainer.default_root_dir={run}", samples, *extra]


# DeepSpeed finds a GPU, as on a machine with one that the trainer leaves alone.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cuda"}
SETTINGS_ON_RANKS = [  # for train.py
    *("--config", "configs/quickstart.yaml", *TINY),
    "--model.config.num_layers=4",
    "--model.config.moe.num_experts=[2, 4]",
    "--data.global_batch_size=8",
    "--data.max_eval_windows=5",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.strategy=nlgmoe.ExpertParallelStrategy",
    "--trainer.strategy.init_args.expert_parallel_size=2",
]


def train_py(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return python(*launcher, "train.py", *args, env=ENVIRONMENT, timeout=300)


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


NOT_REPEATABLE = ("train/tokens_per_second", "train/tflops_per_second", "time/", "memory/")


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Rows of `metrics.csv`, without what differs between two runs of one command."""
    return [
        {key: float(value) for key, value in row.items() if value and not key.startswith(NOT_REPEATABLE)}
        for row in rows_of(run / "metrics.csv")
    ]
