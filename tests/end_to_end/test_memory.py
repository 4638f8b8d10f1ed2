"""Memory of a training run whose experts compute other numbers of rows in every step: it stops growing."""

import os
from pathlib import Path

from tests.support.commands import rows_of
from tests.support.processes import ROOT, python

# A block of SmolLM2-135M upcycled to 8 experts, and its micro-batches, on the pocket Pile.
SETTINGS = {
    "model.config": {"num_layers": 2, "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "ffn_hidden_size": 1536},
    "model.config.moe": {"num_experts": 8, "token_dropping": False},
    "trainer": {"precision": "bf16-mixed", "max_steps": 25, "log_every_n_steps": 1, "limit_val_batches": 0},
    "model": {"config.seq_len": 256, "train_tokens": "null"},
    "data": {"micro_batch_size": 2},
}
BLOCKS = ("configs/moe/laptop.yaml", "configs/block/llama.yaml")


def test_training_of_25_steps_compiles_few_kernels_and_keeps_little_memory(pocket_pile: Path, tmp_path: Path) -> None:
    words = [f"--{part}.{name}={value}" for part, settings in SETTINGS.items() for name, value in settings.items()]
    words += [f"--trainer.default_root_dir={tmp_path}", f"--data.data_dir={pocket_pile}"]
    files = [word for file in BLOCKS for word in ("--config", file)]
    environment = os.environ | {"ONEDNN_VERBOSE": "profile_create"}
    done = python("train.py", "fit", *files, *words, "--trainer.callbacks=null", env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # Some fifteen numbers of rows, matrices of two shapes, each with two gradients; dense layers. Not rounded up: 648 kernels.
    assert 0 < done.stdout.count("create:cache_miss") < 150
    peaks = {int(row["step"]) + 1: float(row["memory/process_bytes"]) for row in rows_of(tmp_path / "metrics.csv")}
    assert peaks[25] < peaks[4] + 1e9, peaks  # kernels for AMX keep some 8 MB each
