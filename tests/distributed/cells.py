"""Jobs of `test_ranks.py`: each trains one `Cell` on this rank, and returns what it computed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch import Tensor, distributed

from nlgmoe.batch import Batch
from nlgmoe.callbacks import ExpertSpecialisation, SaveCheckpoints, StagedDistillation, StopOnSignal
from nlgmoe.callbacks.predictions import PredictionFile
from nlgmoe.callbacks.run_summary import RunSummary
from nlgmoe.checkpoint.reading import TensorFiles, read_document
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data import BatchRampUp, PileDataModule
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.offline_teacher import OfflineTeacher
from nlgmoe.eval.specialisation import Specialisation
from nlgmoe.layers import all_to_all
from nlgmoe.layers.experts import Experts
from nlgmoe.model.counting import count_parameters
from nlgmoe.module import MoEGPTModule
from nlgmoe.non_finite import NonFinite
from nlgmoe.optim.param_groups import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.surgery.warm_start import WarmStart
from tests.support.memory import peak_bytes
from tests.support.ranks import SAMPLES, Cell, Outcome, Recorder, make_trainer, on_ranks, strategy_of, train
from tests.support.synthetic import NumberedData, SyntheticData, ToLongest
from tests.support.trainers import SaveAt


class Spoils(Callback):
    """Makes expert 2 of block 1 NaN or infinite on the last rank, in one step: its gradient, or its output.

    Attributes:
        clocks: tokens seen, and the sum of all weights' magnitudes here, before each step and at the end.
        norms: of each step's gradient, as logged.
        skipped: steps, as logged at the end.
    """

    def __init__(self, step: int, value: float = torch.nan, output: bool = False) -> None:
        self.step, self.value, self.output = step, value, output
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
            self.restore = experts.register_forward_hook(lambda module, inputs, output: output * self.value).remove
        else:
            spoil = torch.zeros_like(experts.project_weight)
            spoil[2 - experts.first] = self.value
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
READERS = {"nlgmoe.layers.all_to_all", "nlgmoe.run.signals", "nlgmoe.step"}


class Traffic(Callback):
    """Counts what this rank sends in the last training step.

    Attributes:
        rows: bytes of tokens sent to other ranks.
        elsewhere: assignments to experts of other ranks.
        assignments: all of them.
        reduced: bytes of the largest all-reduce over all ranks, times the ring's 2 (W - 1) / W.
        waits: times that a module of `READERS` has read a tensor's values, by its name.
    """

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.rows = self.elsewhere = self.assignments = self.reduced = 0
        self.waits: Counter[str] = Counter()
        self._originals = all_to_all.all_to_all_single_autograd, distributed.all_reduce

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last_step:
            all_to_all.all_to_all_single_autograd, distributed.all_reduce = self._exchange, self._reduce
            for name in READS:
                setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        all_to_all.all_to_all_single_autograd, distributed.all_reduce = self._originals
        for name in READS:
            vars(Tensor).get(name) and delattr(Tensor, name)
        layers = [block.moe for block in pl_module.gpt.blocks if block.moe is not None]
        for layer, routing in zip(layers, pl_module.routings, strict=True):
            if batch_idx == self.last_step and layer.placement.group is not None:
                first, count = layer.placement.first, layer.placement.count
                here = (routing.expert >= first) & (routing.expert < first + count)
                self.elsewhere += int((routing.kept & ~here).sum())
                self.assignments += routing.kept.numel()

    def _exchange(self, rows: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        def count(rows: Tensor, sizes: list[int]) -> None:
            self.rows += (len(rows) - sizes[distributed.get_rank(group)]) * rows.shape[1] * rows.element_size()

        count(rows, sent)
        result: Tensor = self._originals[0](rows, received, sent, group)
        if result.requires_grad:
            result.register_hook(lambda gradient: count(gradient, received))
        return result

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any) -> Any:
            self.waits.update(READERS & {sys._getframe(1).f_globals["__name__"]})
            return read(tensor, *args)

        return counted

    def _reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranks = distributed.get_world_size(kwargs.get("group"))
        size = tensor.numel() * tensor.element_size() * 2 * (ranks - 1) // ranks
        self.reduced = max(self.reduced, size)
        return self._originals[1](tensor, *args, **kwargs)


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
        from nlgmoe.parallel.engine import EngineState

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


def saves_at_start(path: Path) -> Callback:
    """A callback that saves what has just been loaded."""
    return LambdaCallback(on_train_start=lambda trainer, module: trainer.save_checkpoint(path))


def with_state(folder: Path) -> list[Callback]:
    """Callbacks with a state of their own, one of which writes `folder/step=5.ckpt`."""
    return [RunSummary(), ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)]


def resume(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> Outcome:
    """Go on from a checkpoint, after saving it again as `CELL.ckpt`."""
    callbacks = [saves_at_start(folder / f"{cell.name}.ckpt"), *with_state(folder / cell.name)]
    return on_ranks(cell, ranks, folder, *callbacks, checkpoint=checkpoint)


def interrupted(cell: Cell, ranks: int, folder: Path) -> tuple[int, int, list[float]]:
    """Exit code and saved step of a run that gets SIGTERM on rank 1 alone in its third step, and its losses when resumed."""

    def tell(trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    where, code = folder / f"{cell.name} interrupted", -1
    try:
        on_ranks(cell, ranks, where, LambdaCallback(on_before_backward=tell), SaveCheckpoints())
    except SystemExit as end:
        code = int(end.code or 0)
    path = where / "checkpoints/last.ckpt"
    step = read_document(path)["global_step"]
    return code, step, on_ranks(cell, ranks, where, checkpoint=path).losses


def warm_start(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> dict[str, float]:
    """Losses of a new run from a checkpoint's weights at its start and end, and of its own weights, saved alone.

    `CELL warm.ckpt` is the new run before its first step, `CELL weights.ckpt` its weights after one.
    """

    def trainer(*callbacks: Callback) -> Trainer:
        return make_trainer(cell, ranks, folder, *callbacks, strategy=strategy_of(cell))

    def evaluated(module: MoEGPTModule, path: Path | None = None) -> float:
        return trainer().validate(module, SyntheticData(), ckpt_path=path, verbose=False)[0]["val/loss"]

    def warm() -> MoEGPTModule:
        module = cell.module()
        module.warm_start = WarmStart(str(checkpoint))
        return module

    fit = trainer(saves_at_start(folder / f"{cell.name} warm.ckpt"))
    fit.fit(warm(), SyntheticData(micro_batch_size=SAMPLES // ranks))
    path = folder / f"{cell.name} weights.ckpt"
    fit.save_checkpoint(path, weights_only=True)
    trained = float(fit.callback_metrics["val/loss"])
    return {"start": evaluated(warm()), "end": trained, "from weights": evaluated(cell.module(), path)}


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


@dataclass
class Overflown:
    """What `overflow` returns: the loss scale and `Spoils.clocks` of each step, the scale's states at a save and in its resume,
    and the error of a run whose scale cannot fall any further."""

    scales: list[float]
    clocks: list[tuple[int, float]]
    states: list[dict[str, Any]]
    error: str


def overflow(cell: Cell, ranks: int, folder: Path) -> Overflown:
    """Steps of fp16 whose third overflows on the last rank."""
    allow_fp16()
    spoils, scales, end = Spoils(2, torch.inf), list[float](), folder / f"{cell.name} at the end.ckpt"

    def note(trainer: Trainer, *_: Any) -> None:
        scales.append(float(trainer.strategy.deepspeed_engine.optimizer.loss_scaler.cur_scale))

    on_ranks(cell, ranks, folder, spoils, LambdaCallback(on_train_batch_start=note))
    states, again = [read_document(end)["loss_scale"]], folder / f"{cell.name} again.ckpt"
    on_ranks(replace(cell, steps=cell.steps + 1), ranks, folder, saves_at_start(again), checkpoint=end)
    states.append(read_document(again)["loss_scale"])
    lowest = replace(cell, options=cell.options | {"min_loss_scale": 2**11})
    error = error_of(lambda: on_ranks(lowest, ranks, folder, Spoils(2, torch.inf)))
    return Overflown(scales, spoils.clocks, states, error)


@dataclass
class Spoilt:
    """What `spoilt` returns: the outcome of a run that skipped a step, what `Spoils` saw, and what a run said that stopped."""

    outcome: Outcome
    clocks: list[tuple[int, float]]
    norms: list[float]
    skipped: float
    error: str


def spoilt(cell: Cell, ranks: int, folder: Path) -> Spoilt:
    """A run that skips its third step, and one that stops there."""
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


def refused(cell: Cell, ranks: int, folder: Path) -> list[str]:
    """Errors for a folder that lacks a rank's file, and for a module built before."""

    def trainer() -> Trainer:
        return make_trainer(replace(cell, steps=2), ranks, folder, strategy=strategy_of(cell))

    path = folder / f"{cell.name} broken.ckpt"
    if distributed.get_rank() == 0:
        shutil.copytree(folder / f"{cell.name} at the end.ckpt", path)
        (path / f"model-00001-of-{ranks:05}.safetensors").unlink()
    distributed.barrier()
    built = cell.module()
    assert built.gpt is not None
    return [
        error_of(lambda: trainer().validate(cell.module(), SyntheticData(), ckpt_path=path, verbose=False)),
        error_of(lambda: trainer().fit(built, SyntheticData())),
    ]


def engine_facts(cell: Cell, ranks: int, folder: Path) -> tuple[bool, dict[str, Any], list[str]]:
    """The engine's throughput timer, the extensions that DeepSpeed compiles, and the backends of the experts' groups."""
    from deepspeed import ops

    strategy = strategy_of(cell)
    make_trainer(replace(cell, steps=1), ranks, folder, strategy=strategy).fit(cell.module(), SyntheticData())
    groups = strategy._groups[ranks]
    backends = [distributed.get_backend(group) for group in (groups.parallel, groups.data_parallel)]
    return strategy.deepspeed_engine.tput_timer.config.enabled, ops.__compatible_ops__, backends


def traffic(cell: Cell, ranks: int, folder: Path) -> dict[str, Any]:
    """What `Traffic` counted."""
    callback = Traffic(cell.steps - 1)
    on_ranks(cell, ranks, folder, callback, StopOnSignal())
    return {name: getattr(callback, name) for name in ("rows", "elsewhere", "assignments", "reduced", "waits")}


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
    """Tokens and logits of the teacher for each of this rank's micro-batches, and the numbers of experts that it has here."""

    def __init__(self) -> None:
        self.said: list[tuple[Tensor, Tensor]] = []
        self.experts: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = pl_module.distiller.model
        if model is not None and not model._forward_hooks:
            self.experts = [len(part.expand_weight) for part in model.modules() if isinstance(part, Experts)]
            model.register_forward_hook(self.hear)

    def hear(self, model: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        self.said.append((inputs[0], model.logits(output.hidden)))


@dataclass
class Taught:
    """What `learn` returns: losses of each step, what `Hears` collected, and whether the teacher is gone."""

    losses: list[float]
    said: list[tuple[Tensor, Tensor]]
    experts: list[int]
    gone: bool


def learn(
    cell: Cell, ranks: int, folder: Path, teacher: Path, *callbacks: Callback, resume: Path | None = None
) -> Taught:
    """Train on growing sequences with a teacher for all but the last two steps."""
    recorder, hears, module = Recorder(), Hears(), cell.module()
    module.distiller = MixtureOfStudents(str(teacher), temperature=2.0)
    module.curriculum = SequenceCurriculum(400, 4, 4)
    strategy = {} if ranks == 1 else {"strategy": strategy_of(cell)}
    staged = StagedDistillation(step=cell.steps - 2)
    fit = make_trainer(cell, ranks, folder, staged, hears, recorder, *callbacks, **strategy)
    fit.fit(module, SyntheticData(micro_batch_size=SAMPLES // ranks), ckpt_path=resume)
    return Taught(recorder.outcome.losses, hears.said, hears.experts, module.distiller.model is None)


def taught(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> Taught:
    """`learn` from a checkpoint; saves `FOLDER/CELL.ckpt` a step before the teacher goes."""
    return learn(cell, ranks, folder, checkpoint, SaveAt(cell.steps - 3, folder / f"{cell.name}.ckpt"))


def taught_on(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> list[float]:
    """Losses after what `taught` saved on one process, beside `checkpoint`."""
    return learn(cell, ranks, folder, checkpoint, resume=checkpoint.parent / f"{cell.name}.ckpt").losses


def taught_offline(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> list[float]:
    """Losses of a run that learns from `NAME.logits`, what the model of `NAME.ckpt` has said of its samples."""
    recorder, module = Recorder(), cell.module()
    logits = str(checkpoint.with_suffix(".logits"))
    module.distiller = OfflineTeacher(logits, temperature=2.0, teacher=str(checkpoint))
    strategy = {} if ranks == 1 else {"strategy": strategy_of(cell)}
    fit = make_trainer(cell, ranks, folder, recorder, **strategy)
    fit.fit(module, NumberedData(micro_batch_size=SAMPLES // ranks))
    return recorder.outcome.losses


def specialised(cell: Cell, ranks: int, folder: Path) -> Specialisation:
    """What the experts are used for after training."""
    place = folder / "specialised"
    settings = {} if ranks == 1 else {"strategy": strategy_of(cell)}
    train(cell, ranks, place, SAMPLES // ranks, cell.accumulate, ExpertSpecialisation(), **settings)
    return Specialisation.load(place)


def growing(cell: Cell, ranks: int, folder: Path) -> tuple[list[float], list[int], int, float]:
    """A run on text whose batch grows from 4 sequences to 12, in two micro-batches, and whose sequences from 4 tokens to 16.

    Returns:
        Losses and numbers of sequences of each step, and the clock and the learning rate at the end.
    """
    config = GPTConfig(4096, 16, cell.layers, 32, 2, init_std=0.05, moe=MoEConfig(cell.experts, **cell.moe))
    schedule = LearningRateSchedule("constant", warmup_tokens=500)
    module = MoEGPTModule(config, AdamWConfig(lr=3e-3), schedule, curriculum=SequenceCurriculum(300, 4, 4))
    ramp_up = BatchRampUp(4, 4, 32 * 16)
    batches = {"micro_batch_size": 6 // ranks, "global_batch_size": 12, "batch_ramp_up": ramp_up, "seq_len": 16}
    data = PileDataModule(str(TEXT), "pocket-4k", **batches, max_eval_windows=3)
    consumed = [0]
    count = LambdaCallback(on_train_batch_end=lambda *_: consumed.append(data.samples_consumed))
    strategy = {} if ranks == 1 else {"strategy": strategy_of(cell)}
    trainer = make_trainer(cell, ranks, folder, recorder := Recorder(), count, accumulate_grad_batches=2, **strategy)
    trainer.fit(module, data)
    sequences = [after - before for before, after in pairwise(consumed) if after > before]
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    return recorder.outcome.losses, sequences, module.tokens_seen, rate


def uneven(cell: Cell, ranks: int, folder: Path) -> tuple[int, int, int, float]:
    """Steps, clock, positions fed to all ranks, and learning rate after 400 tokens of batches that differ between ranks."""
    module, fed = cell.module(), torch.zeros((), dtype=torch.int64)
    module.train_tokens, module.schedule = 400, LearningRateSchedule("cosine", 0.0, 0, 1000)

    def add(trainer: Trainer, module: MoEGPTModule, batch: Batch, _: int) -> None:
        fed.add_(batch["tokens"].numel())

    count = LambdaCallback(on_train_batch_start=add)
    trainer = make_trainer(cell, ranks, folder, count, strategy=strategy_of(cell), accumulate_grad_batches=2)
    trainer.fit(module, ToLongest(micro_batch_size=2, padded=True))
    distributed.all_reduce(fed)
    return trainer.global_step, module.tokens_seen, int(fed), trainer.optimizers[0].param_groups[0]["lr"]


def run_all(jobs: list[tuple[Callable[..., Any], Cell]], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """Every job on this rank."""
    loads = (resume, warm_start, taught, taught_on, taught_offline)
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


def assert_equal(found: Path, expected: Path) -> None:
    """Both hold the same entries, of the same values, in fp32 at least."""
    for kind in ("model", "optimizer"):
        copy, original = TensorFiles(found, kind), TensorFiles(expected, kind)
        assert copy.shapes == original.shapes
        for name in original.shapes:
            assert torch.equal(copy.read(name).float(), original.read(name).float()), name
