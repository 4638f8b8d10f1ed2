"""One training run, on ranks or on the one process it is compared with."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from nlgmoe.callbacks import ExpertLoad, Throughput
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.experts import Experts
from nlgmoe.module import MoEGPTModule
from nlgmoe.non_finite import NonFinite
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.roles import Component
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

SAMPLES = 12  # per optimizer step and accumulated micro-batch, over all ranks: divisible by 1, 2, 3 and 4
LOGGED = 5  # steps between what callbacks log


@dataclass(frozen=True)
class Cell:
    name: str
    degree: int = 1
    stage: int = 2
    experts: int | list[int] = 4
    moe: dict[str, Any] = field(default_factory=lambda: {"token_dropping": False, "aux_scope": "global"})
    layers: int = 4
    accumulate: int = 1
    clip: float = 0.5  # bites: the gradient's norm is about 1
    padded: bool = False
    documents: bool = False
    precision: str | None = "32-true"
    checkpointing: bool = False
    steps: int = 6  # after the fifth, metrics are compared
    hidden: int = 32
    network: Literal["gelu", "swiglu"] = "gelu"
    block: dict[str, Any] = field(default_factory=dict)  # other settings of GPTConfig
    frozen: tuple[Component, ...] = ()
    optimizer: dict[str, Any] = field(default_factory=dict)  # other settings of AdamWConfig
    strategy: str = "expert_parallel"
    non_finite: NonFinite = field(default_factory=NonFinite)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rank_local(self) -> bool:
        """Whether each rank routes for itself: capacity, or statistics of its own."""
        router = self.moe.get("router")
        drops = self.moe.get("token_dropping", router is None or "token_dropping" in router.reads_fields)
        balances = router is None or "aux_scope" in router.reads_fields
        return drops or (balances and self.moe.get("aux_scope", "rank") == "rank")

    def module(self) -> MoEGPTModule:
        """A small model; every cell of the same architecture starts from the same weights."""
        moe = MoEConfig(self.experts, **self.moe)
        settings = {"init_std": 0.05, "ffn_network": self.network, "moe": moe} | self.block
        config = GPTConfig(61, 16, self.layers, self.hidden, 2, **settings)
        optimizer = AdamWConfig(lr=3e-3, frozen=self.frozen, **self.optimizer)
        return MoEGPTModule(config, optimizer, activation_checkpointing=self.checkpointing, non_finite=self.non_finite)


@dataclass
class Outcome:
    """What a run computed.

    Attributes:
        losses: of each optimizer step, of the whole batch.
        squares: of each step's gradients before clipping, by name, one entry per expert; of a rank: those it holds.
        gradients: of the first step.
        clip_norms: the norm by which DeepSpeed clipped each step.
        validation: the loss at the end.
        metrics: what `ExpertLoad` and `Throughput` log after the fifth step.
    """

    losses: list[float] = field(default_factory=list)
    squares: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    clip_norms: list[float] = field(default_factory=list)
    validation: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def norms(self) -> list[float]:
        """Of each step's gradients before clipping."""
        return [sum(squares.values()) ** 0.5 for squares in self.squares]


class Recorder(Callback):
    def __init__(self) -> None:
        self.outcome = Outcome()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == LOGGED and not self.outcome.metrics:
            self.outcome.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        loss = trainer.callback_metrics["train/loss"] + 0.01 * trainer.callback_metrics["train/balance_loss"]
        self.outcome.losses.append(float(loss))
        engine = trainer.strategy.model
        if hasattr(engine, "get_global_grad_norm"):
            self.outcome.clip_norms.append(float(engine.get_global_grad_norm()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = full_gradients(pl_module)
        if not self.outcome.squares:
            self.outcome.gradients = gradients
        self.outcome.squares.append({name: float(value.double().square().sum()) for name, value in gradients.items()})


def full_gradients(module: MoEGPTModule) -> dict[str, Tensor]:
    """Gradients this rank can see, averaged over ranks, by name; experts by their number in the layer."""
    first = {name: part.first for name, part in module.gpt.named_modules() if isinstance(part, Experts)}
    found: dict[str, Tensor] = {}
    for name, parameter in module.gpt.named_parameters():
        gradient = parameter.grad
        if not parameter.requires_grad:
            assert gradient is None
            continue
        if hasattr(parameter, "_hp_mapping") or gradient is None:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        owner, _, leaf = name.rpartition(".")
        if owner in first:
            found |= {f"{owner}.{first[owner] + index}.{leaf}": part for index, part in enumerate(gradient.float())}
        else:
            found[name] = gradient.float()
    return {name: value.detach().clone() for name, value in found.items()}


def train(
    cell: Cell,
    world: int,
    folder: Path,
    micro_batch: int,
    accumulate: int,
    *callbacks: Callback,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Outcome:
    """Train on this process's share; validate after the last step, and save `CELL at the end.ckpt`."""
    recorder, module = Recorder(), cell.module()
    data = SyntheticData(micro_batch_size=micro_batch, padded=cell.padded, documents=cell.documents)
    data.windows = 16  # at least one for each rank
    settings |= {"accumulate_grad_batches": accumulate, "log_every_n_steps": LOGGED}
    trainer = make_trainer(cell, world, folder, Throughput(), ExpertLoad(), recorder, *callbacks, **settings)
    trainer.fit(module, data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{cell.name} at the end.ckpt")
    recorder.outcome.validation = float(trainer.callback_metrics["val/loss"])
    return recorder.outcome


def make_trainer(cell: Cell, world: int, folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """A quiet trainer on the CPU, with the cell's strategy if there are several ranks; validates after the last step."""
    steps = cell.steps * settings.get("accumulate_grad_batches", 1)
    if world > 1:
        settings.setdefault("strategy", strategy_of(cell))
    return Trainer(
        default_root_dir=folder,
        max_steps=cell.steps,
        accelerator="cpu",
        devices=world,
        callbacks=list(callbacks),
        gradient_clip_val=cell.clip,
        precision=cell.precision,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        **{**QUIET, "enable_checkpointing": any(isinstance(one, Checkpoint) for one in callbacks), **settings},
    )


def alone(cell: Cell, ranks: int, folder: Path) -> Outcome:
    """The same training on one process: the whole batch at once, or rank by rank where ranks route for themselves."""
    if cell.rank_local:
        return train(cell, 1, folder, SAMPLES // ranks, cell.accumulate * ranks)
    return train(cell, 1, folder, SAMPLES, cell.accumulate)


def strategy_of(cell: Cell) -> Any:
    from nlgmoe.parallel.strategy import ExpertParallelStrategy

    if cell.strategy != "expert_parallel":
        return cell.strategy
    return ExpertParallelStrategy(cell.stage, cell.degree, timeout_seconds=60, **cell.options)


def on_ranks(cell: Cell, ranks: int, folder: Path, *callbacks: Callback, checkpoint: Path | None = None) -> Outcome:
    return train(cell, ranks, folder, SAMPLES // ranks, cell.accumulate, *callbacks, checkpoint=checkpoint)


def train_all(cells: list[Cell], ranks: int, folder: Path) -> list[Outcome]:
    return [on_ranks(cell, ranks, folder) for cell in cells]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor's error is at most `tolerance` of its norm, or of a thousandth of all tensors' norm."""
    assert found.keys() == expected.keys()
    total = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        error = (found[name] - value).norm()
        assert error <= tolerance * max(value.norm(), 1e-3 * total), f"{name}: {error / value.norm():.1e} of its norm"
