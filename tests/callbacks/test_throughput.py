"""Speed, time and memory, without assertions on times."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import SimpleProfiler

from nlgmoe.callbacks import Throughput
from nlgmoe.callbacks.throughput import PARTS, StepProfiler, _over_ranks
from nlgmoe.hardware import peak_of
from nlgmoe.model.counting import flops_per_token
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.token_schedule import SequenceCurriculum
from tests.support.curriculum import CLOCKS, LENGTHS
from tests.support.synthetic import SyntheticData
from tests.support.trainers import CONFIG, SaveAt, trainer


class Logged(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.profiler: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.profiler = trainer.profiler
        if not trainer.fit_loop._should_accumulate():
            self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_flops_are_those_of_the_lengths_fed_and_continue_when_resumed(tmp_path: Path) -> None:
    def fit(steps: int, *callbacks: Callback, **settings: Any) -> list[dict[str, float]]:
        logged = Logged()
        module = MoEGPTModule(CONFIG, curriculum=SequenceCurriculum(tokens=96, start=4, increment=4))
        often = {"log_every_n_steps": 1, "accumulate_grad_batches": 2}
        run = trainer(tmp_path, Throughput(peak_tflops=0.5), logged, *callbacks, max_steps=steps, **often)
        run.fit(module, SyntheticData(micro_batch_size=2), **settings)
        return logged.steps

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


def test_parts_of_a_step_follow_each_other_and_the_users_profiler_goes_on(tmp_path: Path) -> None:
    logged, profiler = Logged(), SimpleProfiler()
    run = trainer(tmp_path, Throughput(), logged, max_steps=4, log_every_n_steps=2, profiler=profiler)
    run.fit(MoEGPTModule(CONFIG), SyntheticData())
    found = logged.steps[-1]
    parts = {part: found[f"time/{part}"] for part in PARTS}
    assert min(parts.values()) > 0 and sum(parts.values()) < found["time/step"] < found["time/elapsed"]
    assert found["memory/process_bytes"] > 50e6
    assert "train/mfu" not in found  # nobody knows this CPU's
    assert isinstance(logged.profiler, StepProfiler) and run.profiler is profiler
    assert len(profiler.recorded_durations["run_training_batch"]) == 4


def test_times_are_means_and_memory_is_the_maximum_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the second of three ranks; the others have 1 and 3 times what it has."""

    def total(table: torch.Tensor) -> torch.Tensor:
        own = table[2:].view(3, 2)[1]
        return torch.cat([table[:2] * (1 + 1 + 3), own, own, 3 * own])

    monkeypatch.setattr("nlgmoe.callbacks.throughput.sum_over_ranks", total)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    second: Any = SimpleNamespace(world_size=3, global_rank=1, strategy=strategy)
    times, memory = _over_ranks(second, [0.6, 3.0], [7, 5])
    assert times == pytest.approx([1.0, 5.0]) and memory == [21, 15]


def test_throughput_knows_the_peaks_of_gpus() -> None:
    assert peak_of("NVIDIA A100-SXM4-80GB", "bf16-mixed", False) == pytest.approx(312e12)
    assert peak_of("NVIDIA A100-SXM4-40GB", "32-true", True) == pytest.approx(156e12)
    assert peak_of("Tesla V100-SXM2-32GB", "32-true", True) == pytest.approx(15.7e12)
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16-mixed", False) == pytest.approx(989e12)
    for other in ("NVIDIA GeForce RTX 4090", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA GH200 480GB", "NVIDIA H200 NVL"):
        assert peak_of(other, "bf16-mixed", False) is None
