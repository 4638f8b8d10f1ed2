"""A training step, in the order in which it happens.

hook                          when                                          what it does
----------------------------  --------------------------------------------  ------------------------------------------
on_train_start                before the first step                         `begin_steps`
training_step                 each micro-batch                              forward pass and losses
-                             each micro-batch                              Lightning: backward pass; gradients add up
configure_gradient_clipping   after the last micro-batch's backward pass    norm, guard, clipping; logs the step
-                             then                                          AdamW
optimizer_step                contains the four above; then                 ends the step: clocks, data, routers, learning
                                                                            rate, end of training
on_train_batch_end            each micro-batch                              postpones a stop to the end of the step

A checkpoint that is saved within a step holds clocks and data position of the step's start, like its weights.
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
from nlgmoe.layers.router import Router, Routing
from nlgmoe.lightning_state import ends_step, set_loggers_step, trainer_of
from nlgmoe.loss import training_loss
from nlgmoe.model.counting import flops_per_token
from nlgmoe.model.gpt import GPT
from nlgmoe.non_finite import NonFinite, StepGradients, StepGuard
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum, learning_rate, sequence_length
from nlgmoe.ranks import sum_over_ranks
from nlgmoe.run.checks import validate_by_steps
from nlgmoe.run.resume import Resuming, RunClock
from nlgmoe.validation import RunError, require


class TrainingStep(LightningModule):
    """The steps of `MoEGPTModule`, whose arguments these are.

    Attributes:
        tokens_seen: the token clock: positions of all ranks, padding included, up to the last optimizer step.
        rate: learning rate of the next step, before `optimizer.lr_scale`.
        clock: seconds and FLOPs of the run.
        window: the micro-batches since the last optimizer step.
        losses: of the latest step, means over its micro-batches and ranks, by logged name.
        signal: a number of this rank that travels with the losses; callbacks set it in `on_before_optimizer_step`.
        largest_signal: the largest of all ranks at the latest step.
        routings: of the latest micro-batch, by MoE layer, for callbacks to read.
        guard: decides about steps that are not finite.
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
        self.distiller = copy(distiller)  # a fit changes it
        self.tokens_seen, self.rate = 0, optimizer.lr
        self._flops: dict[int, int] = {}  # of a token, by length: counting builds the model
        self.clock = RunClock()
        self.resuming = Resuming()
        self.guard = StepGuard(non_finite)
        self.window = Window()
        self.losses: dict[str, float] = {}
        self.signal = self.largest_signal = 0
        self.routings: list[Routing] = []
        self._learning_routers: dict[int, Router] = {}  # those that change after a step, by MoE layer
        self._stops_after_step = False

    @property
    @abstractmethod
    def gpt(self) -> GPT:
        """The model."""

    @property
    def seq_len(self) -> int:
        """Return the tokens of a whole sequence in training and evaluation."""
        return length_of(training_data(trainer_of(self)), self.config.seq_len)

    @property
    def skipped_steps(self) -> int:
        """Return the number of steps that `non_finite` or fp16's loss scale has skipped since the run began."""
        return self.guard.skipped

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, but keep numbers on the host: Lightning would copy them to the device and back."""
        if isinstance(value, float | int) and not kwargs.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.float64, device="cpu")
        super().log(name, value, *args, **kwargs)

    def begin_steps(self) -> None:
        """Begin the first step of a fit."""
        frozen = "router" in self.optimizer_config.frozen
        routers = enumerate(moe.router for moe in moe_layers(self.gpt) if not frozen)
        self._learning_routers = {moe_layer: router for moe_layer, router in routers if router.learns_from_steps}
        self.window, self._stops_after_step = Window(), False
        data = training_data(self.trainer)
        equal = data is not None and data.has_equal_batches()
        for moe in moe_layers(self.gpt):
            moe.dispatcher.equal_batches = equal
        self._set_rate()
        self.clock.start("run")
        self.clock.start("data")

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set what Lightning loses: the loggers' step in a resumed run, the validation interval where it reloads data."""
        set_loggers_step(self.trainer, self.trainer.global_step)
        validate_by_steps(self.trainer)
        self.clock.stop("data")
        self.clock.start("steps")

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one micro-batch.

        Its random draws (dropout, routing) depend on the seed, the step and the number of the micro-batch over all ranks.
        """
        self.routings = []  # frees those of the last micro-batch
        if self.curriculum is not None:
            # The clock, and with it the length, is constant within a step and the same on every rank.
            batch = truncate(batch, sequence_length(self.tokens_seen, self.seq_len, self.curriculum))
            self.log("train/seq_len", float(batch["tokens"].shape[1]))
        number = len(self.window.losses) * self.trainer.world_size + self.trainer.global_rank
        key = (self.seed, self.trainer.global_step, number)
        loss, terms, self.routings = training_loss(self.gpt, batch, key, self.loss_chunk_size, self.distiller)
        self.log("train/tokens", float(self.tokens_seen))
        requests = [self.routings[moe_layer].tokens_per_expert for moe_layer in self._learning_routers]
        self.window.add(batch, terms, requests)
        return loss

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Log the step, and clip its gradients, or discard them if they or the loss are not finite.

        The host reads losses, gradient norm and the ranks' largest signal from the device in one copy.
        """
        gradients, window = self.step_gradients(), self.window
        self.losses, norm, self.largest_signal = window.read(gradients.norm(), self.signal)
        for name, value in self.losses.items():
            self.log(name, value, prog_bar=name == "train/loss")
        self.log("train/grad_norm", norm)
        self.log("train/lr", self.rate)
        step, total = self.trainer.global_step, sum(self.losses.values())
        window.allowed = self.guard.allows(step, total, norm, self.gpt, window.losses, gradients)
        if not window.allowed:
            gradients.discard()
        elif gradient_clip_val:
            gradients.clip(norm, gradient_clip_val)
        self.log("train/skipped_steps", float(self.guard.skipped))

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Run a micro-batch and, after a step's last one, AdamW; then end the step, before a callback can save it.

        DeepSpeed's strategy calls this for every micro-batch, others for the last one of a step.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if ends_step(self.trainer):
            self.clock.stop("steps")
            optimizer.zero_grad()  # else they live through the next forward pass, beside its activations
            self._end_step(self.trainer.global_step + 1)

    def _end_step(self, step: int) -> None:
        """Advance clocks, data, routers and the rate; stop the trainer after the last step. Lightning counts `step` later."""
        window, self.window = self.window, Window()
        self.tokens_seen += window.tokens
        if window.length not in self._flops:
            self._flops[window.length] = flops_per_token(self.config, window.length)
        self.clock.flops += window.tokens * self._flops[window.length]
        if (data := training_data(self.trainer)) is not None:
            data.advance(window.samples)
        if window.allowed:
            update_routers(list(self._learning_routers.values()), window.requests)
        self._set_rate()
        # Before `should_stop` is set, which makes a validation due: a longer run that resumes this one has none here.
        self.resuming.note_validation(self.trainer)
        # Set now, so that this step is logged and validated as the last one.
        if self.ends_run(step):
            self.trainer.should_stop = True

    def ends_run(self, step: int) -> bool:
        """Return True if the run ends with the micro-batches so far as its step number `step`, whatever callbacks do."""
        tokens = self.tokens_seen + self.window.tokens
        reached_train_tokens = self.train_tokens is not None and tokens >= self.train_tokens
        return self._stops_after_step or reached_train_tokens or 0 <= self.trainer.max_steps <= step

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Postpone a stop within a step, such as a `Timer`'s, to the end of the step."""
        self.clock.stop("steps")
        self.clock.start("data")
        if self.trainer.should_stop and not ends_step(self.trainer):
            self.trainer.should_stop, self._stops_after_step = False, True

    def step_gradients(self) -> StepGradients:
        """Return the gradients of the next optimizer step, from `on_before_optimizer_step` on."""
        of_strategy: Callable[[], StepGradients] | None = getattr(self.trainer.strategy, "step_gradients", None)
        if of_strategy is not None:
            return of_strategy()
        return StepGradients(self.gpt.parameters(), getattr(self.trainer.precision_plugin, "scaler", None))

    def _set_rate(self) -> None:
        (optimizer,), peak = self.trainer.optimizers, self.optimizer_config.lr
        factor = learning_rate(self.tokens_seen, peak, self.schedule) / peak
        self.rate = peak * factor
        for group in optimizer.param_groups:
            group["lr"] = self.rate * group.get("lr_scale", 1.0)


class Window:
    """The micro-batches of this rank since the last optimizer step, and their losses and sizes over all ranks, on the device.

    Attributes:
        losses: losses of each micro-batch of this rank, `[names]`.
        names: names under which the losses are logged.
        requests: `[E]` of each router that learns from steps, of this rank's micro-batches together.
        samples: sequences of all ranks; until `read`, those of this rank times the number of ranks.
        tokens: positions of all ranks, likewise.
        length: positions per sequence of the latest micro-batch.
        allowed: False if the guard skips the step.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.names: list[str] = []
        self.requests: list[Tensor] = []
        self.samples = self.tokens = self.length = 0
        self.allowed = False
        self._ranks = distributed.get_world_size() if distributed.is_initialized() else 1

    def add(self, batch: Batch, losses: dict[str, Tensor], requests: Sequence[Tensor] = ()) -> None:
        """Count one micro-batch."""
        if self.losses and self.names != list(losses):
            raise RunError(f"a step's micro-batches have different losses: {self.names} and {list(losses)}")
        samples, self.length = batch["tokens"].shape
        self.requests = list(map(torch.add, self.requests, requests)) if self.losses else list(requests)
        self.names = list(losses)
        self.losses.append(torch.stack([value.detach().float() for value in losses.values()]))  # [names]
        self.samples += samples * self._ranks
        self.tokens += samples * self.length * self._ranks

    def read(self, norm: Tensor, signal: int) -> tuple[dict[str, float], float, int]:
        """Read the mean losses, a norm and the ranks' largest signal in one copy, and the sizes of all ranks. A collective."""
        values = torch.stack(self.losses).mean(0)  # [names]
        if self._ranks > 1:  # ranks may have batches of other sizes; float64 holds their numbers
            numbers = (self.samples, self.tokens, signal)
            own = torch.cat([values.double(), *(values.new_full((1,), n, dtype=torch.float64) for n in numbers)])
            every = own.repeat(self._ranks, 1)  # [ranks, names + 3]
            distributed.all_gather_into_tensor(every, own[None])
            values = torch.cat([every[:, :-1].mean(0), every[:, -1:].amax(0)])  # sizes: the mean is the number of all
        *read, norm_read = torch.cat([values, norm.to(values)[None]]).tolist()
        if self._ranks > 1:
            self.samples, self.tokens, signal = map(round, read[len(self.names) :])
        return dict(zip(self.names, read, strict=False)), norm_read, signal


def update_routers(routers: Sequence[Router], requests: Sequence[Tensor]) -> None:
    """Update the routers that learn from steps by the requests `[E]` to each of all ranks. A collective if there are any."""
    if not routers:
        return
    everywhere = sum_over_ranks(torch.cat(list(requests)))
    for router, own in zip(routers, everywhere.split([router.num_experts for router in routers]), strict=True):
        router.after_step(own)
