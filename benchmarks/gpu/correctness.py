"""Steps of `make gpu` that compare with the CPU: tests/gpu, training, ZeRO."""

from __future__ import annotations

import importlib
import os
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.gpu.run import Run
from benchmarks.runs import ROOT
from nlgmoe import load_config, load_model
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.parallel.strategy import ExpertParallelStrategy
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

COMPARED = 20  # first and last steps, whose mean losses are compared: the batches are the same ones
ZERO: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO 1, bf16": ("bf16-mixed", {"stage": 1}),
    "ZeRO 1, fp16": ("16-mixed", {"stage": 1}),
    "ZeRO 2, bf16, offload": ("bf16-mixed", {"stage": 2, "offload_optimizer": True}),
    "ZeRO 2, bf16": ("bf16-mixed", {"stage": 2}),
}


class Figures:
    """A plugin of pytest: collects the largest error of each test over its cells."""

    def __init__(self) -> None:
        self.worst: dict[tuple[str, float], float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Read setup, call or teardown."""
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)
        test = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        for name, (value, limit) in report.user_properties if report.when == "teardown" else ():
            key = f"{test}: {name}", limit
            self.worst[key] = max(self.worst.get(key, 0.0), value) if value == value else float("nan")


def parity(run: Run, folder: Path) -> None:
    """Run `pytest tests/gpu`, with every error that it measures among the figures."""
    figures = Figures()
    os.environ["NLGMOE_GPU_DRY_RUN"] = str(int(run.dry))
    # Without tests/conftest.py, whose packages only the suite needs.
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--confcutdir={ROOT / 'tests/gpu'}"]
    without_tuning()
    code = pytest.main([*options, f"--basetemp={folder / 'tests'}", str(ROOT / "tests/gpu")], plugins=[figures])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not figures.worst:
        raise RuntimeError(f"pytest tests/gpu ended with {code!r} and {len(figures.worst)} figures")
    for (name, limit), value in figures.worst.items():
        run.correct(name, value, at_most=limit)
    run.correct("tests that failed", len(figures.failed))
    run.note("which tests failed", figures.failed)


def without_tuning() -> None:
    """Compile one of the six block sizes of DeepSpeed's Triton product: trying all would take a minute for the tests' shapes."""
    if find_spec("triton") is not None:
        module = importlib.import_module("deepspeed.ops.triton_ops.group_gemm_triton")
        for kernel in (module._group_gemm_kernel, module._group_gemm_dw_kernel):
            del kernel.configs[1:]


class Losses(Callback):
    """Collects the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read it."""
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def training(run: Run, folder: Path) -> None:
    """Compare the quickstart with its run on the CPU; save, verify, resume on GPU and CPU.

    Differences of rounding grow with the steps, up to those of seeds (docs/results/log.md): the last steps have a wider limit
    than the first ones, and a resumed run takes two. Dropless: the choice of dropped tokens is drawn on the device, and a GPU
    draws other numbers than a CPU.
    """
    steps, more, windows = (4, 2, 4) if run.dry else (200, 2, 64)

    def fit(
        name: str, where: str, precision: str, steps: int, checkpoint: Path | None = None
    ) -> tuple[list[float], Trainer]:
        experiment = load_config(
            ROOT / "configs/quickstart.yaml",
            model__config__moe__token_dropping=False,
            model__train_tokens=2_000_000,
            model__schedule__decay_tokens=2_000_000,
            data__data_dir=str(run.data),
            data__max_eval_windows=windows,
            trainer__accelerator=where,
            trainer__precision=precision,
            trainer__max_steps=steps,
            trainer__val_check_interval=steps,
            trainer__default_root_dir=str(folder / name),
            trainer__callbacks=[],
            trainer__logger=False,
            trainer__enable_checkpointing=False,
            trainer__enable_progress_bar=False,
        )
        losses = Losses()
        experiment.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
        experiment.trainer.fit(experiment.module, experiment.data, ckpt_path=checkpoint)
        return losses.values, experiment.trainer

    expected, _ = fit("on the CPU", "cpu", "32-true", steps)
    for precision in ("bf16-mixed", "32-true"):
        losses, trainer = fit(precision, run.accelerator, precision, steps)
        first = 1e-3 if precision == "32-true" else 1e-2
        for name, part, limit in (("first", slice(COMPARED), first), ("last", slice(-COMPARED, None), 5e-2)):
            error = abs(statistics.mean(losses[part]) - statistics.mean(expected[part]))
            run.correct(f"loss of the {name} {COMPARED} steps, {precision}, off the CPU's", error, at_most=limit)
    checkpoint = folder / "saved.ckpt"
    trainer.save_checkpoint(checkpoint)
    run.correct("problems that verify finds", len(list(find_problems(Checkpoint(checkpoint)))))
    here, there = (
        float(fit(f"resumed, {where}", where, "32-true", steps + more, checkpoint)[1].callback_metrics["val/loss"])
        for where in (run.accelerator, "cpu")
    )
    run.correct(f"evaluation {more} steps after resuming, GPU off CPU", abs(here - there) / there, at_most=1e-4)


def strategy(run: Run, folder: Path) -> None:
    """Compare `ExpertParallelStrategy` under ZeRO with one process without it, in fp32; evaluate its checkpoint on a CPU."""
    steps, width, length = (4, 32, 16) if run.dry else (20, 256, 256)
    moe = MoEConfig([4, 8], mlp_type="residual", token_dropping=False)
    config = GPTConfig(257, length, 4, width, 4, init_std=0.05, moe=moe)

    def fit(precision: str, strategy: Any) -> tuple[list[float], Trainer]:
        losses = Losses()
        options = {"val_check_interval": steps, "check_val_every_n_epoch": None, "default_root_dir": folder} | QUIET
        trainer = Trainer(
            accelerator=run.accelerator, devices=1, strategy=strategy, precision=precision, max_steps=steps,
            gradient_clip_val=1.0, callbacks=[losses], **options,
        )  # type: ignore[arg-type]  # fmt: skip
        trainer.fit(MoEGPTModule(config, AdamWConfig(lr=1e-3)), SyntheticData(257, length, 8))
        return losses.values, trainer

    without_tuning()
    expected, _ = fit("32-true", "auto")
    for name, (precision, options) in ZERO.items():
        worst = None
        if not (run.dry and precision == "16-mixed"):  # DeepSpeed has no fp16 on a CPU
            losses, trainer = fit(precision, ExpertParallelStrategy(**options))
            worst = max(abs(ours - other) / other for ours, other in zip(losses, expected, strict=True))
        run.correct(f"losses off fp32 without the strategy, {name}", worst, at_most=1e-2)
    trainer.save_checkpoint(folder / "end.ckpt")
    model, values = load_model(folder / "end.ckpt").requires_grad_(False), []
    for batch in SyntheticData(257, length, 8).val_dataloader():
        logits = model.logits(model(batch["tokens"]).hidden).flatten(0, 1)
        values.append(torch.nn.functional.cross_entropy(logits, batch["targets"].flatten(), reduction="none"))
    there, here = float(torch.cat(values).mean()), float(trainer.callback_metrics["val/loss"])
    run.correct("evaluation of its checkpoint on a CPU, off here", abs(there - here) / there, at_most=1e-2)
