"""One optimizer step: an accumulation window of micro-batches, then an update of the weights.

The hooks are in the order in which Lightning calls them.

hook                         when                                   what it does
---------------------------  -------------------------------------  --------------------------------------------------
on_train_start               before the first step                  calls `begin_steps` (`module.py`)
on_train_batch_start         before each micro-batch                sets the loggers' step and the validation interval
training_step                each micro-batch                       computes the losses
-                            then                                   Lightning: backward pass; accumulates gradients
configure_gradient_clipping  last micro-batch, after the backward   logs the step; checks and clips the gradients
-                            then                                   Lightning: `optimizer.step()`
optimizer_step               last micro-batch, after the update     advances token clock, data position, routers and
                                                                    learning rate; stops the trainer after the last step
on_train_batch_end           after each micro-batch                 postpones a stop inside a step to the step's end

For the last micro-batch, `optimizer_step` calls the four rows above it, and then does what its own row says.

A checkpoint saved between two micro-batches of a step holds the state at the end of the previous step: weights,
moments, routers' buffers, token clock and data position. It holds no gradients: a resumed run repeats the unfinished
step from its first micro-batch. Only the seconds of `RunClock` include the unfinished step.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, distributed
from typing_extensions import override

from nlgmoe.batch import Batch, truncate
from nlgmoe.config import GPTConfig
from nlgmoe.data.training_data import length_of, training_data
from nlgmoe.distill.distiller import Distiller
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.router import Router
from nlgmoe.layers.routing import Routing
from nlgmoe.lightning_state import ends_step, set_loggers_step, trainer_of
from nlgmoe.loss import training_loss
from nlgmoe.model.counting import flops_per_token
from nlgmoe.model.gpt import GPT
from nlgmoe.non_finite import NonFinite, StepGradients, StepGuard
from nlgmoe.optim import token_schedule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum, sequence_length
from nlgmoe.ranks import sum_over_ranks
from nlgmoe.run.checks import validate_by_steps
from nlgmoe.run.resume import Resuming, RunClock
from nlgmoe.validation import RunError, require


class TrainingStep(LightningModule):
    """The training hooks of `MoEGPTModule`, which documents the arguments.

    Attributes:
        tokens_seen: the token clock: positions in the finished steps, over all ranks, padding included.
        learning_rate: learning rate of the next step, before `optimizer.lr_scale`.
        clock: seconds and FLOPs of the run.
        window: the micro-batches since the last optimizer step.
        losses: losses of the latest step by logged name, each a mean over micro-batches and ranks.
        signal: a number that callbacks set in `on_before_optimizer_step`, such as that of a received POSIX signal.
            It is gathered with the losses.
        largest_signal: the maximum of `signal` over ranks at the latest step.
        routings: routings of the latest micro-batch by MoE layer, for callbacks.
        guard: checks whether losses and gradients are finite; skips the step or stops the run if they are not.
    """

    config: GPTConfig

    def __init__(
        self,
        optimizer: AdamWConfig,
        schedule: LearningRateSchedule,
        train_tokens: int | None,
        curriculum: SequenceCurriculum | None,
        loss_chunk_size: int,
        seed: int,
        non_finite: NonFinite,
        distiller: Distiller | None,
    ) -> None:
        super().__init__()
        require(loss_chunk_size >= 1, f"loss_chunk_size={loss_chunk_size} must be at least 1 token")
        require(seed >= 0, f"seed={seed} must be at least 0")
        require(train_tokens is None or train_tokens >= 1, f"train_tokens={train_tokens} must be at least 1, or null")
        problem = f"min_lr={schedule.min_lr} is above the peak, model.optimizer.lr={optimizer.lr}"
        require(schedule.min_lr <= optimizer.lr, f"{problem}; lower it")
        self.optimizer_config, self.schedule, self.curriculum = optimizer, schedule, curriculum
        self.train_tokens, self.loss_chunk_size, self.seed = train_tokens, loss_chunk_size, seed
        self.distiller = copy(distiller)  # a fit changes it; the caller's stays as it is
        self.tokens_seen, self.learning_rate = 0, optimizer.lr
        self._flops: dict[int, int] = {}  # FLOPs per token by length; cached: `flops_per_token` builds the model
        self.clock = RunClock()
        self.resuming = Resuming()
        self.guard = StepGuard(non_finite)
        self.window = AccumulationWindow()
        self.losses: dict[str, float] = {}
        self.signal = self.largest_signal = 0
        self.routings: list[Routing] = []
        self._learning_routers: dict[int, Router] = {}  # routers that `after_step` updates, by MoE layer
        self._stops_after_step = False

    @property
    @abstractmethod
    def gpt(self) -> GPT:
        """The model."""

    @property
    def seq_len(self) -> int:
        """Return the number of tokens of a full-length sequence, in training and evaluation."""
        return length_of(training_data(trainer_of(self)), self.config.seq_len)

    @property
    def skipped_steps(self) -> int:
        """Return the number of steps since the run began that `non_finite` or fp16's loss scale skipped."""
        return self.guard.skipped

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, but keep Python numbers on the host: Lightning copies them to the device and back."""
        if isinstance(value, float | int) and not kwargs.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.float64, device="cpu")
        super().log(name, value, *args, **kwargs)

    def begin_steps(self) -> None:
        """Prepare the first step of a fit."""
        frozen = "router" in self.optimizer_config.frozen
        routers = enumerate(moe.router for moe in moe_layers(self.gpt) if not frozen)
        self._learning_routers = {moe_layer: router for moe_layer, router in routers if router.learns_from_steps}
        self.window, self._stops_after_step = AccumulationWindow(), False
        data = training_data(self.trainer)
        equal = data is not None and data.has_equal_batches()
        for moe in moe_layers(self.gpt):
            moe.dispatcher.equal_batches = equal
        self._set_learning_rate()
        self.clock.start("run")
        self.clock.start("data")

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the loggers' step and the validation interval.

        Lightning loses the former in a run that is resumed at its end. It resets the latter when it reloads
        dataloaders.
        """
        set_loggers_step(self.trainer, self.trainer.global_step)
        validate_by_steps(self.trainer)
        self.clock.stop("data")
        self.clock.start("steps")

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one micro-batch.

        The random draws of dropout and routing depend on `seed`, the step, and the index of the micro-batch among those
        of the step on all ranks.
        """
        self.routings = []  # free the tensors of the previous micro-batch
        if self.curriculum is not None:
            # The token clock, and so the length, is the same for all micro-batches of a step and on every rank.
            batch = truncate(batch, sequence_length(self.tokens_seen, self.seq_len, self.curriculum))
            self.log("train/seq_len", float(batch["tokens"].shape[1]))
        index = len(self.window.losses) * self.trainer.world_size + self.trainer.global_rank
        key = (self.seed, self.trainer.global_step, index)
        loss, terms, self.routings = training_loss(self.gpt, batch, key, self.loss_chunk_size, self.distiller)
        self.log("train/tokens", float(self.tokens_seen))
        statistics = [self.routings[moe_layer].step_statistic for moe_layer in self._learning_routers]
        self.window.add(batch, terms, statistics)
        return loss

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Log the step. Clip its gradients, or discard them if they or the loss are not finite.

        One copy from device to host has the losses, the gradient norm and the largest signal of all ranks.
        """
        gradients, window = self.step_gradients(), self.window
        self.losses, norm, self.largest_signal = window.read(gradients.norm(), self.signal)
        for name, value in self.losses.items():
            self.log(name, value, prog_bar=name == "train/loss")
        self.log("train/grad_norm", norm)
        self.log("train/lr", self.learning_rate)
        step, total = self.trainer.global_step, sum(self.losses.values())
        window.allowed = self.guard.allows(step, total, norm, self.gpt, window.losses, gradients)
        if not window.allowed:
            gradients.discard()
        elif gradient_clip_val:
            gradients.clip(norm, gradient_clip_val)
        self.log("train/skipped_steps", float(self.guard.skipped))

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Run a micro-batch. If it is the last one of a step, update the weights and end the step.

        The step ends here, because callbacks save checkpoints in the next hooks. Lightning calls this for the last
        micro-batch of a step, and with DeepSpeed's strategy for every micro-batch.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if ends_step(self.trainer):
            self.clock.stop("steps")
            optimizer.zero_grad()  # free the gradients before the next forward pass allocates its activations
            self._end_step(self.trainer.global_step + 1)

    def _end_step(self, step: int) -> None:
        """Advance clocks, data position, routers and learning rate; stop the trainer after the last step.

        Args:
            step: number of this step, from 1. `trainer.global_step` is one less: Lightning increments it afterwards.
        """
        window, self.window = self.window, AccumulationWindow()
        self.tokens_seen += window.tokens
        if window.length not in self._flops:
            self._flops[window.length] = flops_per_token(self.config, window.length)
        self.clock.flops += window.tokens * self._flops[window.length]
        if (data := training_data(self.trainer)) is not None:
            data.advance(window.samples)
        if window.allowed:
            update_routers(list(self._learning_routers.values()), window.statistics)
        self._set_learning_rate()
        # Call this before `should_stop` is set: at a stop Lightning validates also where no validation interval ends.
        self.resuming.note_validation(self.trainer)
        # Set `should_stop` now: Lightning then logs and validates this step, as it does for the last one.
        if self.ends_run(step):
            self.trainer.should_stop = True

    def ends_run(self, step: int) -> bool:
        """Return True if step number `step`, from 1, is the last one if it consists of the micro-batches so far.

        Stops that callbacks request later in the step are not considered.
        """
        tokens = self.tokens_seen + self.window.tokens
        reached_train_tokens = self.train_tokens is not None and tokens >= self.train_tokens
        return self._stops_after_step or reached_train_tokens or 0 <= self.trainer.max_steps <= step

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Postpone a stop that a callback such as `Timer` requests inside a step to the end of the step."""
        self.clock.stop("steps")
        self.clock.start("data")
        if self.trainer.should_stop and not ends_step(self.trainer):
            self.trainer.should_stop, self._stops_after_step = False, True

    def step_gradients(self) -> StepGradients:
        """Return the accumulated gradients. Call this in `on_before_optimizer_step` or later in the step."""
        of_strategy: Callable[[], StepGradients] | None = getattr(self.trainer.strategy, "step_gradients", None)
        if of_strategy is not None:
            return of_strategy()
        return StepGradients(self.gpt.parameters(), getattr(self.trainer.precision_plugin, "scaler", None))

    def _set_learning_rate(self) -> None:
        (optimizer,) = self.trainer.optimizers
        self.learning_rate = token_schedule.learning_rate(self.tokens_seen, self.optimizer_config.lr, self.schedule)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * group.get("lr_scale", 1.0)


class AccumulationWindow:
    """The losses and sizes of the micro-batches since the last optimizer step.

    Attributes:
        losses: losses of each micro-batch of this rank, `[names]`, on the device.
        names: names under which the losses are logged.
        statistics: `Routing.step_statistic` of each router that `after_step` updates, summed over the micro-batches of this rank.
        samples: sequences over all ranks. Before `read`, an estimate: those of this rank times the number of ranks.
        tokens: positions over all ranks, padding included. Before `read`, an estimate as for `samples`.
        length: positions per sequence of the latest micro-batch.
        allowed: False if the guard skips the step; valid after `configure_gradient_clipping`.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.names: list[str] = []
        self.statistics: list[Tensor] = []
        self.samples = self.tokens = self.length = 0
        self.allowed = False
        self._ranks = distributed.get_world_size() if distributed.is_initialized() else 1

    def add(self, batch: Batch, losses: dict[str, Tensor], statistics: Sequence[Tensor] = ()) -> None:
        """Add one micro-batch."""
        if self.losses and self.names != list(losses):
            raise RunError(f"a step's micro-batches have different losses: {self.names} and {list(losses)}")
        samples, self.length = batch["tokens"].shape
        self.statistics = list(map(torch.add, self.statistics, statistics)) if self.losses else list(statistics)
        self.names = list(losses)
        self.losses.append(torch.stack([value.detach().float() for value in losses.values()]))  # [names]
        self.samples += samples * self._ranks
        self.tokens += samples * self.length * self._ranks

    def read(self, norm: Tensor, signal: int) -> tuple[dict[str, float], float, int]:
        """Return losses by name, means over micro-batches and ranks; the norm; the maximum of `signal` over ranks.

        Set `samples` and `tokens` to their values over all ranks. One copy from device to host. A collective.
        """
        values = torch.stack(self.losses).mean(0)  # [names]
        if self._ranks > 1:  # batch sizes may differ between ranks; float64 represents the counts exactly
            numbers = (self.samples, self.tokens, signal)
            own = torch.cat([values.double(), *(values.new_full((1,), n, dtype=torch.float64) for n in numbers)])
            every = own.repeat(self._ranks, 1)  # [ranks, names + 3]
            distributed.all_gather_into_tensor(every, own[None])
            values = torch.cat([every[:, :-1].mean(0), every[:, -1:].amax(0)])  # mean of size * ranks: sum of sizes
        *read, norm_read = torch.cat([values, norm.to(values)[None]]).tolist()
        if self._ranks > 1:
            self.samples, self.tokens, signal = map(round, read[len(self.names) :])
        return dict(zip(self.names, read, strict=False)), norm_read, signal


def update_routers(routers: Sequence[Router], statistics: Sequence[Tensor]) -> None:
    """Update routers after a step. A collective if there are any.

    Args:
        routers: those that override `after_step`.
        statistics: int64 tensor of each router, of this rank.
    """
    if not routers:
        return
    everywhere = sum_over_ranks(torch.cat([statistic.flatten() for statistic in statistics]))
    parts = everywhere.split([statistic.numel() for statistic in statistics])
    for router, statistic, part in zip(routers, statistics, parts, strict=True):
        router.after_step(part.view_as(statistic))
