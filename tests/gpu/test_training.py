"""Training on a GPU against the CPU: the quickstart, resumed on both; ZeRO against one process without it."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from nlgmoe import load_config, load_model
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data import PocketPile
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.parallel.strategy import ExpertParallelStrategy
from tests.gpu.conftest import DRY, ROOT
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

Near = Callable[[str, float, float], None]
COMPARED = 20  # first and last steps, whose mean losses are compared: the batches are the same ones
ZERO: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO 1, bf16": ("bf16-mixed", {"stage": 1}),
    "ZeRO 2, bf16, offload": ("bf16-mixed", {"stage": 2, "offload_optimizer": True}),
    "ZeRO 2, bf16": ("bf16-mixed", {"stage": 2}),
} | ({} if DRY else {"ZeRO 1, fp16": ("16-mixed", {"stage": 1})})  # DeepSpeed has no fp16 on a CPU


class Losses(Callback):
    """Collects the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def test_quickstart(device: torch.device, near: Near, tmp_path: Path) -> None:
    """Differences of rounding grow with the steps, up to those of seeds (docs/results/log.md): hence the wider limit at the end.

    Dropless: the choice of dropped tokens is drawn on the device, and a GPU draws other numbers than a CPU.
    """
    steps, more, windows = (4, 2, 4) if DRY else (200, 2, 64)
    PocketPile().prepare(ROOT / "data/pocket_pile", "pocket-4k")

    def fit(
        name: str, where: str, precision: str, steps: int, checkpoint: Path | None = None
    ) -> tuple[list[float], Any]:
        experiment = load_config(
            ROOT / "configs/quickstart.yaml",
            model__config__moe__token_dropping=False,
            model__train_tokens=2_000_000,
            model__schedule__decay_tokens=2_000_000,
            data__data_dir=str(ROOT / "data/pocket_pile"),
            data__max_eval_windows=windows,
            trainer__accelerator=where,
            trainer__precision=precision,
            trainer__max_steps=steps,
            trainer__val_check_interval=steps,
            trainer__default_root_dir=str(tmp_path / name),
            trainer__callbacks=[],
            trainer__logger=False,
            trainer__enable_checkpointing=False,
            trainer__enable_progress_bar=False,
        )
        trainer: Any = experiment.trainer
        losses = Losses()
        trainer.callbacks.append(losses)
        trainer.fit(experiment.module, experiment.data, ckpt_path=checkpoint)
        return losses.values, trainer

    here = "cpu" if DRY else "gpu"
    expected, _ = fit("on the CPU", "cpu", "32-true", steps)
    for precision in ("bf16-mixed", "32-true"):
        losses, trainer = fit(precision, here, precision, steps)
        first = 1e-3 if precision == "32-true" else 1e-2
        for name, part, limit in (("first", slice(COMPARED), first), ("last", slice(-COMPARED, None), 5e-2)):
            difference = abs(statistics.mean(losses[part]) - statistics.mean(expected[part]))
            near(f"loss of the {name} {COMPARED} steps, {precision}", difference, limit)
    checkpoint = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(checkpoint)
    assert not list(find_problems(Checkpoint(checkpoint)))
    resumed = {
        where: fit(f"resumed, {where}", where, "32-true", steps + more, checkpoint)[1].callback_metrics["val/loss"]
        for where in {here, "cpu"}
    }
    near("evaluation after resuming", abs(float(resumed[here] / resumed["cpu"]) - 1), 1e-4)


@pytest.mark.parametrize("zero", ZERO)
def test_zero(zero: str, device: torch.device, near: Near, tmp_path: Path) -> None:
    steps, width, length = (4, 32, 16) if DRY else (20, 256, 256)
    moe = MoEConfig([4, 8], mlp_type="residual", token_dropping=False)
    config = GPTConfig(257, length, 4, width, 4, init_std=0.05, moe=moe)

    def fit(precision: Any, strategy: Any) -> tuple[list[float], Trainer]:
        losses = Losses()
        options: dict[str, Any] = {"val_check_interval": steps, "check_val_every_n_epoch": None, **QUIET}
        trainer = Trainer(
            accelerator="cpu" if DRY else "gpu", devices=1, strategy=strategy, precision=precision, max_steps=steps,
            gradient_clip_val=1.0, callbacks=[losses], default_root_dir=tmp_path, **options,
        )  # fmt: skip
        trainer.fit(MoEGPTModule(config, AdamWConfig(lr=1e-3)), SyntheticData(257, length, 8))
        return losses.values, trainer

    precision, options = ZERO[zero]
    expected, _ = fit("32-true", "auto")
    losses, trainer = fit(precision, ExpertParallelStrategy(**options))
    worst = max(abs(ours - other) / other for ours, other in zip(losses, expected, strict=True))
    near("losses off fp32 without the strategy", worst, 1e-2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model, values = load_model(tmp_path / "end.ckpt").requires_grad_(False), []
    for batch in SyntheticData(257, length, 8).val_dataloader():
        logits = model.logits(model(batch["tokens"]).hidden).flatten(0, 1)
        values.append(torch.nn.functional.cross_entropy(logits, batch["targets"].flatten(), reduction="none"))
    there, here = float(torch.cat(values).mean()), float(trainer.callback_metrics["val/loss"])
    near("evaluation of its checkpoint on a CPU", abs(there - here) / there, 1e-2)
