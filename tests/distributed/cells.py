"""Runs training on several gloo ranks and hands back what they computed."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch import Tensor, distributed, multiprocessing

from benchmarks.ranks import measure
from nlgmoe.batch import Batch
from nlgmoe.callbacks import (
    ExpertLoad,
    ExpertSpecialisation,
    SaveCheckpoints,
    StagedDistillation,
    Throughput,
)
from nlgmoe.callbacks.predictions import PredictionFile
from nlgmoe.callbacks.run_summary import RunSummary
from nlgmoe.checkpoint.folder import read_document
from nlgmoe.checkpoint.warm_start import WarmStart
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data import BatchRampUp, PileDataModule
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.offline_teacher import OfflineTeacher
from nlgmoe.eval.specialisation import Specialisation
from nlgmoe.layers import all_to_all
from nlgmoe.layers.experts import Experts
from nlgmoe.model.counting import count_parameters, flops_per_token
from nlgmoe.module import MoEGPTModule
from nlgmoe.non_finite import NonFinite
from nlgmoe.optim.param_groups import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from tests.memory import peak_bytes
from tests.synthetic import NumberedData, OfUnknownLength, SyntheticData, ToLongest

SAMPLES = 12  # per optimizer step and accumulated micro-batch, over all ranks: divisible by 1, 2, 3 and 4

LOGGED = 5  # steps between what callbacks log

TINY_ON_RANKS = [  # for train.py
    *("--config", "configs/quickstart.yaml"),
    "--model.config.num_layers=4",
    "--model.config.moe.num_experts=[2, 4]",
    "--model.config.hidden_size=32",
    "--model.config.seq_len=32",
    "--model.config.num_heads=2",
]


@dataclass(frozen=True)
class Cell:
    """One training run, on ranks or on the one process it is compared with."""

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
    strategy: str = "expert_parallel"
    teacher_precision: Literal["fp32", "bf16"] | None = None
    non_finite: NonFinite = field(default_factory=NonFinite)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rank_local(self) -> bool:
        """Whether each rank routes for itself: capacity, or statistics of its own."""
        router = self.moe.get("router")
        drops = self.moe.get("token_dropping", router is None or "token_dropping" in router.uses)
        balances = router is None or "aux_scope" in router.uses
        return drops or (balances and self.moe.get("aux_scope", "rank") == "rank")

    def module(self) -> MoEGPTModule:
        """A small model; every cell of the same architecture starts from the same weights."""
        moe = MoEConfig(self.experts, **self.moe)
        config = GPTConfig(
            61, 16, self.layers, self.hidden, 2, init_std=0.05, ffn_network=self.network, moe=moe, **self.block
        )
        return MoEGPTModule(
            config, AdamWConfig(lr=3e-3), activation_checkpointing=self.checkpointing, non_finite=self.non_finite
        )


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

    losses: list[float]
    squares: list[dict[str, float]]
    gradients: dict[str, Tensor]
    clip_norms: list[float]
    validation: float
    metrics: dict[str, float]


class Recorder(Callback):
    """Collects an `Outcome` on every rank."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.squares: list[dict[str, float]] = []
        self.clip_norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == LOGGED and not self.metrics:
            self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        loss = trainer.callback_metrics["train/loss"] + 0.01 * trainer.callback_metrics["train/balance_loss"]
        self.losses.append(float(loss))
        engine = trainer.strategy.model
        if hasattr(engine, "get_global_grad_norm"):
            self.clip_norms.append(float(engine.get_global_grad_norm()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = full_gradients(pl_module)
        if not self.squares:
            self.gradients = gradients
        self.squares.append({name: float(value.double().square().sum()) for name, value in gradients.items()})


def full_gradients(module: MoEGPTModule) -> dict[str, Tensor]:
    """Gradients this rank can see, averaged over ranks, by name; experts by their number in the layer."""
    first = {name: part.first for name, part in module.gpt.named_modules() if isinstance(part, Experts)}
    found: dict[str, Tensor] = {}
    for name, parameter in module.gpt.named_parameters():
        gradient = parameter.grad
        if hasattr(parameter, "_hp_mapping") or gradient is None:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        owner, _, leaf = name.rpartition(".")
        if owner in first:
            found |= {f"{owner}.{first[owner] + index}.{leaf}": part for index, part in enumerate(gradient.float())}
        else:
            found[name] = gradient.float()
    return {name: value.detach().clone() for name, value in found.items()}


class Overflow(Callback):
    """Makes the third step's gradient overflow on one rank, and remembers loss scale, clock and a weight around it."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, float]] = []
        self.skipped = 0
        self.states: list[dict[str, Any]] = []  # of the loss scale, at start and at the end
        self.remove_hook: Callable[[], None] = lambda: None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        scaler = trainer.strategy.deepspeed_engine.optimizer.loss_scaler
        weight = float(pl_module.gpt.blocks[1].moe.experts.project_weight.detach().float().sum())
        self.seen.append((float(scaler.cur_scale), pl_module.tokens_seen, weight))

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if len(self.seen) == 3 and trainer.global_rank == 1:
            experts = pl_module.gpt.blocks[1].moe.experts.project_weight
            hook = experts.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
            self.remove_hook = hook.remove

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.remove_hook()
        self.skipped = int(trainer.callback_metrics["train/skipped_steps"])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        from nlgmoe.parallel.checkpointing import loss_scale

        self.states.append(loss_scale(trainer.strategy.model))

    on_train_end = on_train_start


class Spoils(Callback):
    """Makes expert 2 of block 1 NaN on the last rank, in one step: its gradient, or its output.

    Attributes:
        clocks: tokens seen, and the sum of all weights' magnitudes here, before each step and at the end.
        norms: of each step's gradient, as logged.
        skipped: steps, as logged at the end.
    """

    def __init__(self, step: int, output: bool = False) -> None:
        self.step, self.output = step, output
        self.clocks: list[tuple[int, float]] = []
        self.norms: list[float] = []
        self.skipped = 0.0
        self.restore: Callable[[], None] = lambda: None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._look(pl_module)
        if trainer.global_step != self.step or trainer.global_rank != trainer.world_size - 1:
            return
        experts = pl_module.gpt.blocks[1].moe.experts
        if self.output:
            self.restore = experts.register_forward_hook(lambda module, inputs, output: output * torch.nan).remove
        else:
            spoil = torch.zeros_like(experts.project_weight)
            spoil[2 - experts.first] = torch.nan
            self.restore = experts.project_weight.register_hook(lambda gradient: gradient + spoil).remove

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.restore()
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))
            self.skipped = float(trainer.callback_metrics["train/skipped_steps"])

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._look(pl_module)

    def _look(self, module: Any) -> None:
        weight = sum(float(parameter.detach().double().abs().sum()) for parameter in module.parameters())
        self.clocks.append((module.tokens_seen, weight))


READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")


class Traffic(Callback):
    """Counts what this rank sends in the last training step.

    Attributes:
        rows: bytes of tokens sent to other ranks.
        elsewhere: assignments to experts of other ranks.
        assignments: all of them.
        reduced: bytes of the largest all-reduce over all ranks, times the ring's 2 (W - 1) / W.
        waits: times that the exchange has read a tensor's values.
    """

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.rows = self.elsewhere = self.assignments = self.reduced = self.waits = 0
        self._originals = {name: getattr(distributed, name) for name in ("all_to_all_single", "all_reduce")}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last_step:
            distributed.all_to_all_single, distributed.all_reduce = self._exchange, self._reduce
            for name in READS:
                setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, function in self._originals.items():
            setattr(distributed, name, function)
        for name in READS:
            vars(Tensor).get(name) and delattr(Tensor, name)
        layers = [block.moe for block in pl_module.gpt.blocks if block.moe is not None]
        for layer, routing in zip(layers, pl_module.routings, strict=True):
            if batch_idx == self.last_step and layer.placement.group is not None:
                first, count = layer.placement.first, layer.placement.count
                here = (routing.expert >= first) & (routing.expert < first + count)
                self.elsewhere += int((routing.kept & ~here).sum())
                self.assignments += routing.kept.numel()

    def _exchange(self, output: Tensor, sent: Tensor, *splits: Any, group: Any, **kwargs: Any) -> Any:
        if splits:  # rows; without splits it is their numbers
            self.rows += (len(sent) - splits[1][distributed.get_rank(group)]) * sent.shape[1] * sent.element_size()
        return self._originals["all_to_all_single"](output, sent, *splits, group=group, **kwargs)

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any) -> Any:
            self.waits += sys._getframe(1).f_code.co_filename == all_to_all.__file__
            return read(tensor, *args)

        return counted

    def _reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranks = distributed.get_world_size(kwargs.get("group"))
        size = tensor.numel() * tensor.element_size() * 2 * (ranks - 1) // ranks
        self.reduced = max(self.reduced, size)
        return self._originals["all_reduce"](tensor, *args, **kwargs)


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Types(Callback):
    """Notes in which types a run computes and keeps what.

    Attributes:
        found: by the columns of the table in docs/numerics.md: weights, matrix products, gradients summed over micro-batches,
            their largest reduction over ranks (not of `ddp`), what the optimizer steps on, and the moments.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._reduced = 0
        self._all_reduce = distributed.all_reduce

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        linear = pl_module.gpt.blocks[0].ffn.expand
        linear.register_forward_hook(lambda module, inputs, output: self._note("products", output))
        distributed.all_reduce = self._reduce

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        zero = getattr(trainer.strategy.model, "optimizer", None)
        if not hasattr(zero, "averaged_gradients"):
            self._note("sums", pl_module.gpt.token_embedding.weight.grad)
        elif zero.cpu_offload:
            self._note("sums", next(iter(zero.accumulated_grads_in_cpu.values())))
        else:
            self._note("sums", next(iter(zero.averaged_gradients.values()))[0])

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        distributed.all_reduce = self._all_reduce
        weight = pl_module.gpt.token_embedding.weight
        self._note("weights", weight)
        if not hasattr(trainer.strategy.model, "optimizer"):
            self._note("stepped on", weight)
            self._note("moments", trainer.optimizers[0].state[weight]["exp_avg"])
            return
        from nlgmoe.parallel.engine_state import EngineState

        if hasattr(trainer.strategy.model.optimizer, "bit16_groups"):  # weights are views of one buffer
            assert all(one.data_ptr() % 16 == 0 for one in pl_module.gpt.parameters())
        state = EngineState(trainer.strategy.model)
        for name, key in (("stepped on", None), ("moments", "exp_avg")):
            if (fragment := state.fragment(weight, key)) is not None:  # ZeRO gives some ranks none of it
                self._note(name, fragment[1])

    def _note(self, name: str, tensor: Tensor) -> None:
        self.found[name] = NAMES[tensor.dtype]

    def _reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() > self._reduced:
            self._reduced = tensor.numel()
            self._note("reduced", tensor)
        return self._all_reduce(tensor, *args, **kwargs)


class SavesAtStart(Callback):
    """Saves what has just been loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


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
    settings |= {"accumulate_grad_batches": accumulate, "log_every_n_steps": LOGGED}
    trainer = make_trainer(cell, world, folder, Throughput(), ExpertLoad(), recorder, *callbacks, **settings)
    trainer.fit(module, data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{cell.name} at the end.ckpt")
    validation = float(trainer.callback_metrics["val/loss"])
    return Outcome(
        recorder.losses, recorder.squares, recorder.gradients, recorder.clip_norms, validation, recorder.metrics
    )


def make_trainer(cell: Cell, world: int, folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """A quiet trainer on the CPU; validates after the last step."""
    steps = cell.steps * settings.get("accumulate_grad_batches", 1)
    return Trainer(
        default_root_dir=folder,
        max_steps=cell.steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=world,
        callbacks=list(callbacks),
        gradient_clip_val=cell.clip,
        precision=cell.precision,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=steps,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        **settings,
    )


def alone(cell: Cell, ranks: int, folder: Path) -> Outcome:
    """The same training on one process: the whole batch at once, or rank by rank where ranks route for themselves."""
    if cell.rank_local:
        return train(cell, 1, folder, SAMPLES // ranks, cell.accumulate * ranks)
    return train(cell, 1, folder, SAMPLES, cell.accumulate)


def strategy_of(cell: Cell) -> Any:
    """The cell's strategy."""
    from nlgmoe.parallel.strategy import ExpertParallelStrategy

    if cell.strategy != "expert_parallel":
        return cell.strategy
    return ExpertParallelStrategy(cell.stage, cell.degree, timeout_seconds=60, **cell.options)


def on_ranks(cell: Cell, ranks: int, folder: Path, *callbacks: Callback, checkpoint: Path | None = None) -> Outcome:
    """Train on this rank as one of `ranks`."""
    share = SAMPLES // ranks
    strategy = strategy_of(cell)
    return train(cell, ranks, folder, share, cell.accumulate, *callbacks, checkpoint=checkpoint, strategy=strategy)


def with_state(folder: Path) -> list[Callback]:
    """Callbacks with a state of their own, one of which writes `folder/step=5.ckpt`."""
    return [RunSummary(), ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)]


def resume(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> Outcome:
    """Go on from a checkpoint, after saving it again as `CELL.ckpt`."""
    callbacks = [SavesAtStart(folder / f"{cell.name}.ckpt"), *with_state(folder / cell.name)]
    return on_ranks(cell, ranks, folder, *callbacks, checkpoint=checkpoint)


def resume_halves(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> Outcome:
    """Likewise from `bf16-true.ckpt` beside the checkpoint."""
    return resume(cell, ranks, folder, checkpoint.with_name("bf16-true.ckpt"))


class SavesMeasured(Callback):
    """Saves after the first step, everything and weights alone; the most memory that this rank held of its own for each.

    The lesser of two saves counts: when a collective lets go of its tensors depends on the other rank.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.peaks = folder, list[int]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for alone in (False, True):
            path = self._folder / f"weights only {alone}.ckpt"
            self.peaks.append(min(peak_bytes(partial(trainer.save_checkpoint, path, alone)) for _ in range(2)))


def save_large(cell: Cell, ranks: int, folder: Path) -> tuple[int, list[int]]:
    """Save `CELL at the end.ckpt` after a step; bytes of its tensors, and `SavesMeasured.peaks`."""
    measured = SavesMeasured(folder / cell.name)
    on_ranks(cell, ranks, folder, measured)
    counted = count_parameters(cell.module().config).total
    return 3 * 4 * counted, measured.peaks  # weights and two moments, fp32


def warm_start(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """A new run from a checkpoint's weights: its loss at start; then what becomes of its own weights, saved alone.

    `CELL warm.ckpt` is the new run before its first step, `CELL weights.ckpt` its weights after one.
    """

    def trainer(*callbacks: Callback) -> Trainer:
        return make_trainer(cell, ranks, folder, *callbacks, strategy=strategy_of(cell))

    def evaluated(module: MoEGPTModule, path: Path | None = None) -> float:
        return trainer().validate(module, SyntheticData(), ckpt_path=path, verbose=False)[0]["val/loss"]

    def warm(cell: Cell) -> MoEGPTModule:
        module = cell.module()
        module.warm_start = WarmStart(str(checkpoint))
        return module

    found: dict[str, Any] = {"loss": evaluated(warm(cell))}
    fit, data = (
        trainer(SavesAtStart(folder / f"{cell.name} warm.ckpt")),
        SyntheticData(micro_batch_size=SAMPLES // ranks),
    )
    fit.fit(warm(cell), data)
    path = folder / f"{cell.name} weights.ckpt"
    fit.save_checkpoint(path, weights_only=True)
    found |= {"trained": float(fit.callback_metrics["val/loss"]), "from weights": evaluated(cell.module(), path)}
    found["resumed"] = error_of(lambda: trainer().fit(cell.module(), SyntheticData(), ckpt_path=path))
    found["larger"] = error_of(lambda: trainer().fit(warm(replace(cell, experts=8)), SyntheticData()))
    return found


class Tell(Callback):
    """Sends SIGTERM to rank 1 alone: in its third step's first backward pass, or in a validation after the second step."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.hook == "on_validation_start":
            trainer.val_check_interval = 2

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if self.hook == "on_before_backward" and trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.hook == "on_validation_start" and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(cell: Cell, ranks: int, folder: Path) -> tuple[list[Any], list[int], list[float]]:
    """Exit codes and saved steps of training and of validation where `Tell` interrupts, and the losses of the former resumed."""
    codes, steps = [], []
    for hook in ("on_validation_start", "on_before_backward"):
        where = folder / f"{cell.name} interrupted {hook}"
        try:
            on_ranks(cell, ranks, where, Tell(hook), SaveCheckpoints())
        except SystemExit as end:
            codes.append(end.code)
        steps.append(read_document(where / "checkpoints/last.ckpt")["global_step"])
    return codes, steps, on_ranks(cell, ranks, where, checkpoint=where / "checkpoints/last.ckpt").losses


def typed(cell: Cell, ranks: int, folder: Path) -> tuple[Outcome, dict[str, str]]:
    """Train, and what `Types` found."""
    allow_fp16()
    types = Types()
    if ranks > 1:
        return on_ranks(cell, ranks, folder, types), types.found
    plugin: dict[str, Any] = {}
    if cell.precision == "16-mixed":  # Lightning itself takes bf16 on CPUs
        cell, plugin = replace(cell, precision=None), {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    return train(cell, 1, folder, SAMPLES, cell.accumulate, types, **plugin), types.found


def allow_fp16() -> None:
    """DeepSpeed says that this CPU has no fp16; it has it, slowly."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # type: ignore[method-assign]


def overflow(cell: Cell, ranks: int, folder: Path) -> tuple[list[tuple[float, int, float]], int, list[dict[str, Any]]]:
    """What `Overflow` saw and counted in four steps of fp16, and the loss scale's state then and where its checkpoint goes on."""
    allow_fp16()
    callback, resumed = Overflow(), Overflow()
    on_ranks(cell, ranks, folder, callback)
    again = replace(cell, steps=cell.steps + 1)
    on_ranks(again, ranks, folder, resumed, checkpoint=folder / f"{cell.name} at the end.ckpt")
    return callback.seen, callback.skipped, [callback.states[-1], resumed.states[0]]


@dataclass
class Spoilt:
    """What `spoilt` returns: the outcome of a run that skipped a step, what `Spoils` saw, and what a run said that stopped."""

    outcome: Outcome
    clocks: list[tuple[int, float]]
    norms: list[float]
    skipped: float
    error: str


def spoilt(cell: Cell, ranks: int, folder: Path) -> Spoilt:
    """A run that skips its third step, and one that stops there; before, one that skips its only step."""
    on_ranks(replace(cell, name=f"{cell.name}, first", steps=1), ranks, folder, Spoils(0))
    skips = Spoils(2)
    outcome = on_ranks(cell, ranks, folder, skips)
    error = error_of(lambda: on_ranks(replace(cell, non_finite=NonFinite()), ranks, folder, Spoils(2, output=True)))
    return Spoilt(outcome, skips.clocks, skips.norms, skips.skipped, error)


def error_of(job: Callable[[], Any]) -> str:
    """Run a job that must fail; return the message of its error."""
    try:
        job()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error was raised")


def refused(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> list[str]:
    """What is said of a folder that lacks a rank's file, a module built before, a teacher that cannot be spread, a parameter that
    is frozen after the first step, an epoch that ends within a step, another number of micro-batches of a step, another limit of
    the gradient's norm, and weights in a checkpoint that a callback has added.

    Last, the steps of a trainer that has gone on from its own checkpoint.
    """

    def trainer(*callbacks: Callback, steps: int = 2, **settings: Any) -> Trainer:
        return make_trainer(
            replace(cell, steps=steps), ranks, folder, *callbacks, strategy=strategy_of(cell), **settings
        )

    def fit(*callbacks: Callback) -> Trainer:
        run = trainer(*callbacks)
        run.fit(cell.module(), SyntheticData())
        return run

    path = folder / f"{cell.name} broken.ckpt"
    if distributed.get_rank() == 0:
        shutil.copytree(folder / f"{cell.name} at the end.ckpt", path)
        (path / f"model-00001-of-{ranks:05}.safetensors").unlink()
    distributed.barrier()
    built = cell.module()
    assert built.gpt is not None
    three = replace(cell, name="three experts", degree=1, experts=3, steps=1)
    on_ranks(three, ranks, folder)
    freezes = LambdaCallback(on_train_batch_end=lambda _, module, *rest: module.gpt.final_norm.requires_grad_(False))
    sets = {
        name: LambdaCallback(
            on_train_batch_end=lambda trainer, *_, name=name, value=value: setattr(trainer, name, value)
        )
        for name, value in (("accumulate_grad_batches", 2), ("gradient_clip_val", 0.25))
    }
    more = {"a": torch.zeros(1)}
    fills = LambdaCallback(on_save_checkpoint=lambda _, module, checkpoint: checkpoint["state_dict"].update(more))
    messages = [
        error_of(lambda: trainer().validate(cell.module(), SyntheticData(), ckpt_path=path, verbose=False)),
        error_of(lambda: trainer().fit(built, SyntheticData())),
        error_of(lambda: learn(cell, ranks, folder, folder / "three experts at the end.ckpt")),
        error_of(lambda: fit(freezes)),
        error_of(
            lambda: trainer(steps=9, accumulate_grad_batches=2).fit(cell.module(), OfUnknownLength(micro_batch_size=2))
        ),
        *(error_of(lambda callback=callback: fit(callback)) for callback in sets.values()),  # type: ignore[misc]
    ]
    filled = fit(fills)
    messages.append(error_of(lambda: filled.save_checkpoint(folder / "filled.ckpt")))
    run, module, data = trainer(), cell.module(), SyntheticData()
    run.fit(module, data)
    run.save_checkpoint(folder / "two steps.ckpt")
    run.fit_loop.epoch_loop.max_steps = 3
    run.fit(module, data, ckpt_path=folder / "two steps.ckpt")
    return [*messages, str(run.global_step)]


def engine_facts(cell: Cell, ranks: int, folder: Path) -> dict[str, Any]:
    """The engine's throughput timer, the extensions that DeepSpeed found, and the backends of the experts' groups.

    Of the group of one rank also what each of the collectives makes of 1, 2, which DeepSpeed and checkpoints use.
    """
    from deepspeed import ops

    strategy = strategy_of(cell)
    make_trainer(replace(cell, steps=1), ranks, folder, strategy=strategy).fit(cell.module(), SyntheticData())
    groups = strategy._groups[ranks]
    alone, given = groups.data_parallel, torch.tensor([1.0, 2.0])
    collectives: dict[str, Callable[[Tensor], Any]] = {
        "all_reduce": lambda result: distributed.all_reduce(result.copy_(given), group=alone),
        "reduce": lambda result: distributed.reduce(result.copy_(given), distributed.get_rank(), group=alone),
        "broadcast": lambda result: distributed.broadcast(result.copy_(given), distributed.get_rank(), group=alone),
        "all_gather": lambda result: distributed.all_gather([result], given, group=alone),
        "all_gather_into_tensor": lambda result: distributed.all_gather_into_tensor(result, given, group=alone),
        "reduce_scatter_tensor": lambda result: distributed.reduce_scatter_tensor(result, given, group=alone),
    }
    results = {name: torch.zeros(2) for name in collectives}
    for name, collective in collectives.items():
        collective(results[name])
    return {
        "timed": strategy.deepspeed_engine.tput_timer.config.enabled,
        "extensions": ops.__compatible_ops__,
        "backends": [distributed.get_backend(group) for group in (groups.parallel, alone)],
        "members": distributed.get_process_group_ranks(alone),
        "collectives": {name: result.tolist() for name, result in results.items()},
    }


def lowest_scale(cell: Cell, ranks: int, folder: Path) -> str:
    """What a run says whose gradients overflow when its loss scale cannot fall any further; after `overflow`."""
    lowest = replace(cell, options=cell.options | {"min_loss_scale": 2**11})
    return error_of(lambda: on_ranks(lowest, ranks, folder, Overflow()))


def traffic(cell: Cell, ranks: int, folder: Path) -> dict[str, int]:
    """What `Traffic` counted."""
    callback = Traffic(cell.steps - 1)
    on_ranks(cell, ranks, folder, callback)
    return {name: getattr(callback, name) for name in ("rows", "elsewhere", "assignments", "reduced", "waits")}


def gpu_ranks(cell: Cell, ranks: int, folder: Path) -> dict[str, float]:
    """What `benchmarks/ranks.py` measures on GPUs, at its tiny shapes."""
    return measure(torch.device("cpu"), tiny=True)


TEXT = Path(__file__).parents[2] / "data" / "pocket_pile"  # where the fixture `pocket_pile` builds it


def evaluate_text(cell: Cell, ranks: int, folder: Path) -> dict[str, float]:
    """All that `validate` and `test` say of an untrained model on 20 windows of text, and what `predict` writes here."""
    config = GPTConfig(4096, 16, cell.layers, 32, 2, init_std=0.05, moe=MoEConfig(cell.experts, **cell.moe))
    data = PileDataModule(str(TEXT), "pocket-4k", micro_batch_size=3, seq_len=16, max_eval_windows=5)
    data.global_batch_size = 3  # which no step on several ranks could have: evaluation has no steps

    def trainer(*callbacks: Callback) -> Trainer:
        settings = {} if ranks == 1 else {"strategy": strategy_of(cell)}
        return make_trainer(cell, ranks, folder / "evaluated", *callbacks, **settings)

    (validated,) = trainer().validate(MoEGPTModule(config), data, verbose=False)
    (tested,) = trainer().test(MoEGPTModule(config), data, verbose=False)
    (run := trainer(PredictionFile())).predict(MoEGPTModule(config), data, return_predictions=False)
    rank = f"-{run.global_rank}" if ranks > 1 else ""
    written = load_file(folder / f"evaluated/predictions{rank}.safetensors")
    losses = zip(written["windows"].tolist(), written["losses"].mean(dim=1).tolist(), strict=True)
    return {**validated, **tested, **{f"window {window}": loss for window, loss in losses}}


class Hears(Callback):
    """What the teacher says of each of this rank's micro-batches, tokens and logits, and of the same tokens before each."""

    def __init__(self) -> None:
        self.said: list[tuple[Tensor, Tensor]] = []
        self.asked: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = pl_module.distiller.model
        if model is None:
            return
        with torch.no_grad():
            self.asked.append(model.logits(model(QUESTION).hidden))
        if not model._forward_hooks:
            model.register_forward_hook(self.hear)

    def hear(self, model: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        if inputs[0] is not QUESTION:
            self.said.append((inputs[0], model.logits(output.hidden)))


QUESTION = torch.arange(48).view(3, 16)


@dataclass
class Taught:
    """What `taught` returns: losses of each micro-batch, what `Hears` heard, the teacher's experts here, whether it is gone."""

    losses: list[float]
    said: list[tuple[Tensor, Tensor]]
    asked: list[Tensor]
    experts: list[int]
    freed: bool


class SavesAroundTheEnd(Callback):
    """Saves `FOLDER/CELL before.ckpt`, a step before the teacher goes, and `at.ckpt`; notes how many experts it has here."""

    def __init__(self, cell: Cell, folder: Path) -> None:
        self.cell, self.folder = cell, folder
        self.experts: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        for when, steps in AROUND_THE_END.items():
            if trainer.global_step == self.cell.steps - steps:
                trainer.save_checkpoint(self.folder / f"{self.cell.name} {when}.ckpt")
        if trainer.global_step == 1:
            stacks = [part for part in pl_module.distiller.model.modules() if isinstance(part, Experts)]
            self.experts = [len(stack.expand_weight) for stack in stacks]


AROUND_THE_END = {"before": 3, "at": 2}  # steps left


def learn(
    cell: Cell, ranks: int, folder: Path, teacher: Path, *callbacks: Callback, resume: Path | None = None
) -> tuple[Recorder, Hears, MoEGPTModule]:
    """Train on growing sequences with a teacher for all but the last two steps."""
    recorder, hears, module = Recorder(), Hears(), cell.module()
    module.distiller = MixtureOfStudents(str(teacher), temperature=2.0, precision=cell.teacher_precision)
    module.curriculum = SequenceCurriculum(400, 4, 4)
    strategy = {} if ranks == 1 else {"strategy": strategy_of(cell)}
    staged = StagedDistillation(step=cell.steps - 2)
    fit = make_trainer(cell, ranks, folder, staged, hears, recorder, *callbacks, **strategy)
    fit.fit(module, SyntheticData(micro_batch_size=SAMPLES // ranks), ckpt_path=resume)
    return recorder, hears, module


def taught(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> Taught:
    """A run that learns from a checkpoint for all but its last two steps."""
    saves = SavesAroundTheEnd(cell, folder)
    recorder, hears, module = learn(cell, ranks, folder, checkpoint, saves)
    assert module.distiller is not None
    return Taught(recorder.losses, hears.said, hears.asked, saves.experts, module.distiller.model is None)


def taught_on(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> dict[str, list[float]]:
    """Losses after what `taught` saved here, and after what one process saved: `checkpoint`'s folder has that."""
    return {
        f"{when}, saved by {whose}": learn(cell, ranks, where, checkpoint, resume=where / f"{cell.name} {when}.ckpt")[
            0
        ].losses
        for when in AROUND_THE_END
        for whose, where in {"ranks": folder, "one process": checkpoint.parent}.items()
    }


def taught_offline(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> list[float]:
    """Losses of a run that learns from `NAME.logits`, what the model of `NAME.ckpt` has said of its samples."""
    recorder, module = Recorder(), cell.module()
    logits = str(checkpoint.with_suffix(".logits"))
    module.distiller = OfflineTeacher(logits, temperature=2.0, teacher=str(checkpoint))
    strategy = {} if ranks == 1 else {"strategy": strategy_of(cell)}
    fit = make_trainer(cell, ranks, folder, recorder, **strategy)
    fit.fit(module, NumberedData(micro_batch_size=SAMPLES // ranks))
    return recorder.losses


@dataclass
class Grown:
    """What `growing` returns: losses of each step, sequences in each step, and the clock and the rate at the end."""

    losses: list[float]
    sequences: list[int]
    tokens: int
    rate: float


class Counts(Callback):
    """Sequences trained on, over all ranks, by step."""

    def __init__(self) -> None:
        self.consumed = [0]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (consumed := trainer.datamodule.samples_consumed) > self.consumed[-1]:  # type: ignore[attr-defined]
            self.consumed.append(consumed)


def specialised(cell: Cell, ranks: int, folder: Path) -> Specialisation:
    """What the experts are used for after training."""
    place = folder / "specialised"
    settings = {} if ranks == 1 else {"strategy": strategy_of(cell)}
    train(cell, ranks, place, SAMPLES // ranks, cell.accumulate, ExpertSpecialisation(), **settings)
    return Specialisation.load(place)


def growing(cell: Cell, ranks: int, folder: Path) -> Grown:
    """A run on text whose batch grows from 4 sequences to 12, in two micro-batches, and whose sequences from 4 tokens to 16."""
    config = GPTConfig(4096, 16, cell.layers, 32, 2, init_std=0.05, moe=MoEConfig(cell.experts, **cell.moe))
    schedule = LearningRateSchedule("constant", warmup_tokens=500)
    module = MoEGPTModule(config, AdamWConfig(lr=3e-3), schedule, curriculum=SequenceCurriculum(300, 4, 4))
    data = PileDataModule(
        str(TEXT),
        "pocket-4k",
        micro_batch_size=6 // ranks,
        global_batch_size=12,
        batch_ramp_up=BatchRampUp(4, 4, 32 * 16),
        seq_len=16,
        max_eval_windows=3,
    )
    recorder, counts = Recorder(), Counts()
    strategy = {} if ranks == 1 else {"strategy": strategy_of(cell)}
    trainer = make_trainer(cell, ranks, folder, recorder, counts, accumulate_grad_batches=2, **strategy)
    trainer.fit(module, data)
    sequences = [later - earlier for earlier, later in pairwise(counts.consumed)]
    return Grown(recorder.losses, sequences, module.tokens_seen, trainer.optimizers[0].param_groups[0]["lr"])


def uneven(cell: Cell, ranks: int, folder: Path) -> tuple[int, int, int, float, float]:
    """Steps, clock, positions fed to all ranks, and learning rate after 400 tokens of batches that differ between ranks.

    Last, the FLOPs by `Throughput` over those of each batch of each rank.
    """
    module, fed = cell.module(), torch.zeros(2, dtype=torch.float64)
    module.train_tokens, module.schedule = 400, LearningRateSchedule("cosine", 0.0, 0, 1000)

    def add(trainer: Trainer, module: MoEGPTModule, batch: Batch, _: int) -> None:
        tokens = batch["tokens"]
        fed.add_(torch.tensor([1, flops_per_token(module.config, tokens.shape[1])]) * tokens.numel())

    count, speed = LambdaCallback(on_train_batch_start=add), Throughput()
    trainer = make_trainer(cell, ranks, folder, count, speed, strategy=strategy_of(cell), accumulate_grad_batches=2)
    trainer.fit(module, ToLongest(micro_batch_size=2, padded=True))
    distributed.all_reduce(fed)
    flops = speed.state_dict()["flops"] / float(fed[1])
    return trainer.global_step, module.tokens_seen, int(fed[0]), trainer.optimizers[0].param_groups[0]["lr"], flops


def evaluate(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> float:
    """The validation loss of a checkpoint."""
    trainer = make_trainer(cell, ranks, folder, strategy=strategy_of(cell))
    (found,) = trainer.validate(cell.module(), SyntheticData(), ckpt_path=checkpoint, verbose=False)
    return found["val/loss"]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def spawn(ranks: int, job: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """Run `job(*args)` on every rank; what each returned.

    Raises:
        AssertionError: a rank raised; the message has its traceback.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    processes = multiprocessing.start_processes(
        _rank, (ranks, port, job, args, folder), nprocs=ranks, start_method="forkserver", join=False
    )
    assert processes is not None
    try:
        while not processes.join():
            pass
    except Exception as error:
        errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
        raise AssertionError("\n".join(errors) or str(error)) from None
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, job: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",  # Lightning then takes the processes as they are
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        result = job(*args)
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))


def run_all(jobs: list[tuple[Callable[..., Any], Cell]], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """Every job on this rank."""
    loads = (evaluate, resume, resume_halves, refused, warm_start, taught, taught_on, taught_offline)
    return [job(cell, ranks, folder, *(args if job in loads else ())) for job, cell in jobs]


class Raises(Callback):
    """Fails on rank 1 in the second step; with `hangs`, rank 1 waits for ever instead."""

    def __init__(self, hangs: bool = False) -> None:
        self.hangs = hangs

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            if self.hangs:
                time.sleep(10_000)
            raise ValueError("rank 1 has had enough")


class TellsMain(Callback):
    """Rank 1 sends SIGTERM to the process that has started it, in the third step."""

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getppid(), signal.SIGTERM)
