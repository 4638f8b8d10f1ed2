"""Speed, time and memory, without assertions on speeds."""

import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import distributed

from nlgmoe.callbacks import SaveCheckpoints, Throughput
from nlgmoe.callbacks.throughput import _over_ranks
from nlgmoe.hardware import peak_of
from nlgmoe.model.counting import flops_per_token
from nlgmoe.module import MoEGPTModule
from tests.support.curriculum import CLOCKS, CURRICULUM, LENGTHS
from tests.support.synthetic import SyntheticData
from tests.support.trainers import CONFIG, Logged, SaveAt, trainer


def test_flops_are_those_of_the_lengths_fed_and_continue_when_resumed(tmp_path: Path) -> None:
    def fit(steps: int, *callbacks: Callback, **settings: Any) -> list[dict[str, float]]:
        logged = Logged()
        module = MoEGPTModule(CONFIG, curriculum=CURRICULUM)
        often = {"log_every_n_steps": 1, "accumulate_grad_batches": 2}
        run = trainer(tmp_path, Throughput(peak_tflops=0.5), logged, *callbacks, max_steps=steps, **often)
        run.fit(module, SyntheticData(micro_batch_size=2), **settings)
        return logged.logged

    path = tmp_path / "seven.ckpt"  # in the middle of the fourth step, which begins anew
    straight = fit(6, SaveAt(7, path))
    fed = [(later - earlier) for earlier, later in pairwise(CLOCKS)]
    total = 0
    for tokens, length, logged in zip(fed, LENGTHS, straight, strict=True):
        total += tokens * flops_per_token(CONFIG, length)
        assert logged["train/flops"] == total
        assert logged["train/mfu"] == pytest.approx(logged["train/tflops_per_second"] / 0.5, rel=1e-5)
        ratio = flops_per_token(CONFIG, length) / 1e12
        assert logged["train/tflops_per_second"] == pytest.approx(logged["train/tokens_per_second"] * ratio, rel=1e-5)
    again = fit(6, ckpt_path=path)
    assert [one["train/flops"] for one in again] == [one["train/flops"] for one in straight[3:]]
    assert again[0]["time/elapsed"] > straight[2]["time/elapsed"]


def test_waiting_for_data_counts_neither_saves_nor_validations(tmp_path: Path) -> None:
    logged, pause = Logged(), lambda *_: time.sleep(0.4)
    pauses = LambdaCallback(on_save_checkpoint=pause, on_validation_end=pause)  # once each between the two steps
    settings = {"max_steps": 2, "log_every_n_steps": 2, "val_check_interval": 1}
    settings |= {"limit_val_batches": 1, "enable_checkpointing": True}
    run = trainer(tmp_path, Throughput(), logged, pauses, SaveCheckpoints(every_n_steps=1), **settings)
    run.fit(MoEGPTModule(CONFIG), SyntheticData())
    found = logged.logged[-1]
    assert 0 < found["time/data"] < min(0.2, found["time/step"]) and found["time/elapsed"] > 0.8 + found["time/step"]
    assert found["memory/process_bytes"] > 50e6
    assert "train/mfu" not in found  # nobody knows this CPU's


def test_times_are_means_and_memory_is_the_maximum_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the second of three ranks; the others have 1 and 3 times what it has."""
    monkeypatch.setattr("nlgmoe.callbacks.throughput.sum_over_ranks", lambda own: own * (1 + 1 + 3))
    largest = {distributed.ReduceOp.MAX: 3}
    monkeypatch.setattr(distributed, "all_reduce", lambda own, operation: own.mul_(largest[operation]))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    second: Any = SimpleNamespace(world_size=3, global_rank=1, strategy=strategy)
    times, memory = _over_ranks(second, [0.6, 3.0], [7, 5])
    assert times == pytest.approx([1.0, 5.0]) and memory == [21, 15]


def test_throughput_knows_the_peaks_of_gpus() -> None:
    assert peak_of("NVIDIA A100-SXM4-80GB", "bf16-mixed", False) == pytest.approx(312e12)
    assert peak_of("NVIDIA H200 NVL", "bf16-mixed", False) is None
