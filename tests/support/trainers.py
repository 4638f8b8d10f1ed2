"""Trainers without output, and callbacks that save or keep what a run says."""

from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from nlgmoe.config import GPTConfig, MoEConfig

# Options of a Trainer that is compared or timed: endless data, no files, no output.
QUIET: dict[str, Any] = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
CONFIG = GPTConfig(61, 16, 4, 32, 2, moe=MoEConfig([2, 4], mlp_type="residual", z_loss_coeff=0.001))


class Recorder(Callback):
    """Losses and logged step numbers by micro-batch, learning rates by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.steps: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.steps.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    settings = {**QUIET, "accelerator": "cpu", "limit_val_batches": 0, **settings}
    return Trainer(default_root_dir=root, callbacks=list(callbacks), **settings)


class Logged(Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class SaveAt(Callback):
    def __init__(self, micro_batch: int, path: Path) -> None:
        self.micro_batch, self.path = micro_batch, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.micro_batch:
            trainer.save_checkpoint(self.path)
