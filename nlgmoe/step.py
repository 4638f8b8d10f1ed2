"""A training step, in the order in which it happens. `MoEGPTModule` calls it from Lightning's hooks.

hook of Lightning             when                                          here
----------------------------  --------------------------------------------  ------------------------------------------
on_train_start                before the first step                         `begin`
training_step                 each micro-batch                              `micro_batch`: forward pass and losses
-                             each micro-batch                              Lightning: backward pass; gradients add up
configure_gradient_clipping   after the last micro-batch's backward pass    `before_update`: norm, guard, clipping
-                             then                                          Lightning: `optimizer.step()`, AdamW
lr_scheduler_step             then                                          `after_update`: clocks, data, routers, rate
on_train_batch_end            each micro-batch                              `postpone_stop`
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from nlgmoe.batch import Batch, truncate
from nlgmoe.data.training_data import training_data
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.router import Router
from nlgmoe.loss import mean_over_ranks, training_loss
from nlgmoe.non_finite import StepGradients, StepGuard
from nlgmoe.optim.token_schedule import sequence_length
from nlgmoe.validation import RunError

if TYPE_CHECKING:
    from nlgmoe.module import MoEGPTModule


class TrainingSteps:
    """The training steps of one module, one after another.

    Args:
        module: the module to train.

    Attributes:
        tokens_seen: the token clock: positions fed to all ranks, padding included, up to the last optimizer step.
        length: positions per sequence of the latest micro-batch.
        window: the micro-batches since then.
        losses: of the latest step, the means over its micro-batches and ranks, by logged name.
        guard: decides about steps that are not finite.
    """

    def __init__(self, module: MoEGPTModule) -> None:
        self._module = module
        self.tokens_seen = self.length = 0
        self.guard = StepGuard(module.non_finite)
        self.window = Window()
        self.losses: dict[str, float] = {}
        self._learning_routers: dict[int, Router] = {}  # by MoE layer: those that change after a step
        self._stops_after_step = False

    def begin(self) -> None:
        """Begin the first accumulation window."""
        routers = enumerate(moe.router for moe in moe_layers(self._module.gpt))
        self._learning_routers = {layer: router for layer, router in routers if router.learns_from_steps}
        self.window = Window()
        self._stops_after_step = False

    def micro_batch(self, batch: Batch) -> Tensor:
        """Compute the loss of one micro-batch.

        Its random draws (dropout, routing) depend on the seed, the step and the number of the micro-batch over all ranks.
        """
        module, trainer = self._module, self._module.trainer
        module.routings = []  # frees those of the last micro-batch
        if module.curriculum is not None:
            # The clock, and with it the length, is constant within an accumulation window and the same on every rank.
            batch = truncate(batch, sequence_length(self.tokens_seen, module.seq_len, module.curriculum))
            module.log("train/seq_len", float(batch["tokens"].shape[1]))
        self.length = batch["tokens"].shape[1]
        number = len(self.window.losses) * trainer.world_size + trainer.global_rank
        key = (module.seed, trainer.global_step, number)
        loss, losses, routings = training_loss(module.gpt, batch, key, module.loss_chunk_size, module.distiller)
        module.log("train/tokens", float(self.tokens_seen))
        self.window.add(batch, losses, [routings[layer].tokens_per_expert for layer in self._learning_routers])
        module.routings = routings
        return loss

    def before_update(self, gradients: StepGradients, clip_val: float | None, clip_algorithm: str | None) -> None:
        """Log the step, and clip its gradients, or discard them if they or the loss are not finite.

        The host reads losses and gradient norm from the device in one copy.
        """
        module, window = self._module, self.window
        self.losses, norm = window.read(gradients.norm())
        for name, value in self.losses.items():
            module.log(name, value, prog_bar=name == "train/loss")
        module.log("train/grad_norm", norm)
        module.log("train/lr", module.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        step = module.trainer.global_step
        window.allowed = self.guard.allows(step, sum(self.losses.values()), norm, module.gpt, window.losses, gradients)
        if not window.allowed:
            gradients.discard()
        elif clip_val:
            gradients.clip(clip_val, clip_algorithm)
        module.log("train/skipped_steps", float(self.guard.skipped))

    def after_update(self, scheduler: Any) -> None:
        """Advance clocks, data and routers, then the learning rate; stop the trainer after the last step.

        Lightning calls this before a callback can save a checkpoint. A checkpoint that is saved within an accumulation window
        therefore holds the position of the window's start, like its weights.
        """
        module, trainer, window = self._module, self._module.trainer, self.window
        self.tokens_seen += window.tokens
        if (data := training_data(trainer)) is not None:
            data.advance(window.samples)
        if window.allowed:
            self._update_routers()
        self.window = Window()
        with warnings.catch_warnings():
            # PyTorch warns if the first step was skipped, as often in fp16; this schedule follows the clock.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            scheduler.step()
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        # Read before `should_stop` is set, which makes a validation due: a longer run that resumes this one has none here.
        module.resuming.validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        # Set now, so that this step is logged and validated as the last one.
        if self.ends_run(trainer.global_step):
            trainer.should_stop = True

    def ends_run(self, step: int) -> bool:
        """Return True if the run ends with the `step`th step, to which the micro-batches so far belong, whatever callbacks do."""
        end, max_steps = self._module.train_tokens, self._module.trainer.max_steps
        return self._stops_after_step or (end is not None and self._module.tokens_fed >= end) or 0 <= max_steps <= step

    def _update_routers(self) -> None:
        """Update the routers that learn from steps with the requests of all ranks. A collective if there are any."""
        if not self._learning_routers:
            return
        requests = torch.cat(self.window.requests)
        if distributed.is_initialized():
            distributed.all_reduce(requests)
        routers = list(self._learning_routers.values())
        for router, own in zip(routers, requests.split([router.num_experts for router in routers]), strict=True):
            router.after_step(own)

    def postpone_stop(self) -> None:
        """Postpone a stop within an accumulation window, such as a `Timer`'s, to the end of the step."""
        trainer = self._module.trainer
        if trainer.should_stop and trainer.fit_loop.epoch_loop._should_accumulate():
            trainer.should_stop, self._stops_after_step = False, True


class Window:
    """The micro-batches of this rank since the last optimizer step, and their losses and sizes over all ranks, on the device.

    Attributes:
        losses: losses of each micro-batch of this rank, `[names]`.
        names: names under which the losses are logged.
        requests: `[E]` of each router that learns from steps, of this rank's micro-batches together.
        samples: sequences of all ranks; until `read`, those of this rank times the number of ranks.
        tokens: positions of all ranks, likewise.
        allowed: False if the guard skips the step.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.names: list[str] = []
        self.requests: list[Tensor] = []
        self.samples = self.tokens = 0
        self.allowed = False
        self._ranks = distributed.get_world_size() if distributed.is_initialized() else 1

    def add(self, batch: Batch, losses: dict[str, Tensor], requests: Sequence[Tensor] = ()) -> None:
        """Count one micro-batch."""
        if self.losses and self.names != list(losses):
            raise RunError(f"a step's micro-batches have different losses: {self.names} and {list(losses)}")
        samples, length = batch["tokens"].shape
        self.requests = list(map(torch.add, self.requests, requests)) if self.losses else list(requests)
        self.names = list(losses)
        self.losses.append(torch.stack([value.detach().float() for value in losses.values()]))  # [names]
        self.samples += samples * self._ranks
        self.tokens += samples * length * self._ranks

    def read(self, norm: Tensor) -> tuple[dict[str, float], float]:
        """Read the mean losses and a norm from the device in one copy, and the sizes of all ranks. A collective."""
        values = torch.stack(self.losses).mean(0)  # [names]
        if self._ranks > 1:  # ranks may have batches of other sizes; float64 holds their numbers
            sizes = (self.samples, self.tokens)  # the mean over ranks is the number of all
            values = torch.cat([values.double(), *(values.new_full((1,), size, dtype=torch.float64) for size in sizes)])
            mean_over_ranks(values)
        *read, norm_read = torch.cat([values, norm.to(values)[None]]).tolist()
        if self._ranks > 1:
            self.samples, self.tokens = map(round, read[len(self.names) :])
        return dict(zip(self.names, read, strict=False)), norm_read
