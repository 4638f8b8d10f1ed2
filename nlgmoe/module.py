"""MoEGPTModule, the LightningModule: training step, optimizer, learning rate, and the token clock."""

from __future__ import annotations

import warnings
from copy import copy
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from nlgmoe.batch import Batch, truncate
from nlgmoe.checkpoint.same_run import check_same_run, check_tokenizer
from nlgmoe.checkpoint.warm_start import WarmStart
from nlgmoe.config import GPTConfig
from nlgmoe.data.training_data import TrainingData, training_data
from nlgmoe.distill.distiller import Distiller, KeepsState
from nlgmoe.gpt_module import GPTModule
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.router import Routing
from nlgmoe.non_finite import HasStepGradients, LocalGradients, NonFinite, StepGradients, StepGuard
from nlgmoe.objective import LearningRouters, Window, training_loss
from nlgmoe.optim.param_groups import AdamWConfig, build_adamw, require_adamw
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum, learning_rate, sequence_length
from nlgmoe.run.resume import Resuming, StepSize, check_new_run, validate_by_steps
from nlgmoe.run_checks import warn_about_end, warn_about_rate
from nlgmoe.validation import SettingError


class MoEGPTModule(GPTModule):
    """Train a GPT: cross-entropy, the balance losses of its MoE layers, and the distillation loss if there is a teacher.

    The random draws of a step (dropout, routing noise, token selection) are a function of `seed`, the step and the
    micro-batch's index over all ranks: a resumed run, or another number of ranks, draws the same numbers.

    Args:
        config: shape of the model.
        optimizer: AdamW's settings.
        schedule: the learning rate over tokens.
        train_tokens: training ends with the step that reaches this many tokens; null: the trainer determines the end
            (`max_steps`, `max_time`).
        curriculum: train on short sequences first; null: on whole ones. Evaluation always uses whole sequences.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        compile: compile attention and dense layers with `torch.compile`, at the first step; for GPUs. Needs a C compiler there,
            and a C++ compiler on CPUs, where it gains nothing (docs/performance.md).
        loss_chunk_size: tokens whose logits are in memory at a time; the head uses `loss_chunk_size * vocab_size` values.
        seed: seed of the initial weights and of all random draws in training.
        warm_start: initial weights from a checkpoint; null: random ones. `train.py` ignores it when `--ckpt_path` resumes a run.
        non_finite: handling of a step whose loss or gradients are NaN or infinite: stop the run or skip the step.
        distiller: teacher to distil from until `StagedDistillation` ends distillation; null: train on text alone. The module
            makes a copy of its own, `module.distiller`.
    """

    def __init__(
        self,
        config: GPTConfig,
        optimizer: AdamWConfig = AdamWConfig(),  # noqa: B008 (frozen)
        schedule: LearningRateSchedule = LearningRateSchedule(shape="constant"),  # noqa: B008 (frozen)
        train_tokens: int | None = None,
        curriculum: SequenceCurriculum | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        loss_chunk_size: int = 1024,
        seed: int = 1234,
        warm_start: WarmStart | None = None,
        non_finite: NonFinite = NonFinite(),  # noqa: B008 (frozen)
        distiller: Distiller | None = None,
    ) -> None:
        super().__init__(config, seed, activation_checkpointing, compile, loss_chunk_size, warm_start, curriculum)
        if train_tokens is not None and train_tokens < 1:
            raise SettingError(f"train_tokens={train_tokens} must be at least 1, or null")
        if schedule.min_lr > optimizer.lr:
            raise SettingError(
                f"min_lr={schedule.min_lr} is above the peak, model.optimizer.lr={optimizer.lr}; lower it"
            )
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.train_tokens = train_tokens
        self.distiller = copy(distiller)  # a fit changes it
        self.tokens_seen = 0  # the token clock: positions fed, padding included, up to the last optimizer step
        self.guard = StepGuard(non_finite)
        self._lengths = 0  # of `lengths_fed`, up to the last optimizer step
        self._window = Window()
        self._stops_after_step = False
        self._resuming = Resuming()

    @property
    def tokens_fed(self) -> int:
        """Return `tokens_seen` plus the positions of the micro-batches since the last optimizer step, over all ranks."""
        return self.tokens_seen + self._window.tokens

    @property
    def lengths_fed(self) -> int:
        """Return the sum over positions fed, by all ranks since the module was made, of the lengths of their sequences."""
        return self._lengths + self._window.lengths

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one micro-batch."""
        if self.curriculum is not None:
            # The clock, and with it the length, is constant within an accumulation window and the same on every rank.
            batch = truncate(batch, sequence_length(self.tokens_seen, self.config.seq_len, self.curriculum))
            self.log("train/seq_len", float(batch["tokens"].shape[1]))
        loss, losses, self.routings = self._loss(batch, len(self._window.losses))
        self.log("train/tokens", float(self.tokens_seen))
        self._window.add(batch, losses)
        self._learning_routers.count(self.routings)
        return loss

    def _loss(self, batch: Batch, index: int) -> tuple[Tensor, dict[str, Tensor], list[Routing]]:
        """Compute the loss of micro-batch `index` of the step; see `training_loss`."""
        ranks = self.trainer.world_size
        key = (self.seed, self.trainer.global_step, index * ranks + self.trainer.global_rank)
        return training_loss(self.gpt, batch, key, self.loss_chunk_size, self.distiller)

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients, or drop them where they or the loss are not finite (`non_finite`), and log the step.

        Lightning calls this between the backward pass and the optimizer's step. The host reads losses and gradient norm from
        the device in one copy.

        Raises:
            NonFiniteError: `non_finite` stops the run.
        """
        gradients = self.step_gradients()
        window, step = self._window, self.trainer.global_step
        losses, norm = window.read(gradients.norm())
        for name, value in zip(window.names, losses, strict=True):
            self.log(name, value, prog_bar=name == "train/loss")
        self.log("train/grad_norm", norm)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        window.taken = self.guard.allows(step, sum(losses), norm, self.gpt, window.losses, gradients)
        if not window.taken:
            gradients.discard()
        elif gradient_clip_val:
            gradients.clip(gradient_clip_val, gradient_clip_algorithm)
        self.log("train/skipped_steps", float(self.guard.skipped))

    def step_gradients(self) -> StepGradients:
        """Return the gradients of the next optimizer step, from `on_before_optimizer_step` on."""
        trainer = self.trainer
        if isinstance(trainer.strategy, HasStepGradients):
            return trainer.strategy.step_gradients()
        return LocalGradients(self.gpt.parameters(), getattr(trainer.precision_plugin, "scaler", None))

    @override
    def configure_optimizers(self) -> Any:
        """Build AdamW with named groups, and a learning rate that follows the token clock."""
        optimizer = build_adamw(self.gpt, self.optimizer_config)
        scheduler = LambdaLR(optimizer, lambda _: self._lr_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}

    def _lr_factor(self) -> float:
        """Return the learning rate of the next step as a factor of the peak."""
        return learning_rate(self.tokens_seen, self.optimizer_config.lr, self.schedule) / self.optimizer_config.lr

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance the clocks, then the learning rate.

        Lightning calls this once after every optimizer step, before a callback can save a checkpoint. A checkpoint that is
        saved within an accumulation window therefore holds the position of the window's start, like its weights.
        """
        self.tokens_seen += self._window.tokens
        self._lengths += self._window.lengths
        planned = None
        if (data := training_data(self.trainer)) is not None:
            planned = data.planned_batch_size()
            data.advance(self._window.samples)
        step = StepSize(self._window.samples, self.trainer.world_size, len(self._window.losses))
        self._resuming.end_step(self.trainer, step, planned, self.config.moe)
        if self._window.taken:
            self._learning_routers.after_step()
        self._window = Window()
        self._learning_routers.begin_step()
        with warnings.catch_warnings():
            # PyTorch warns if the first step was skipped, as often in fp16; this schedule follows the clock.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            scheduler.step()
        loop = self.trainer.fit_loop
        assert loop._data_fetcher is not None
        # Before the end is known: a run that is resumed with a later one has no validation at this end.
        self._resuming.validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        fed = self.train_tokens is not None and self.tokens_seen >= self.train_tokens
        # Set now, so that this step is logged and validated as the last one.
        if fed or self._stops_after_step or 0 <= self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Postpone a stop within an accumulation window, such as a `Timer`'s, to the end of the step."""
        if self.trainer.should_stop and self.trainer.fit_loop.epoch_loop._should_accumulate():
            self.trainer.should_stop, self._stops_after_step = False, True

    @override
    def on_fit_start(self) -> None:
        """Set training mode: an interrupted validation leaves the model in evaluation mode."""
        self.train()
        # Else Lightning ends before `on_train_start`; `Resuming.begin` asks a `Timer` again.
        self.trainer.should_stop = False

    @override
    def on_train_start(self) -> None:
        """Begin the first accumulation window.

        Optimizer settings are those of the configuration, not of the checkpoint: a change takes effect on resume. A run
        that is resumed at its end is validated again.
        """
        check_new_run(self.trainer, self.tokens_seen)
        validate_by_steps(self.trainer)
        self._resuming.begin(self.trainer, self.tokens_seen, self.train_tokens)
        warn_about_end(self.config, self.curriculum, self.schedule, self.train_tokens, self.trainer)
        self._window, self._stops_after_step = Window(), False
        self._learning_routers = LearningRouters(self.gpt)
        data = self.trainer.fit_loop._data_source.instance  # `trainer.datamodule` may be that of an evaluation before
        equal = isinstance(data, TrainingData) and data.has_equal_batches()
        for moe in moe_layers(self.gpt):
            moe.dispatcher.equal_batches = equal
        (optimizer,), peak = self.trainer.optimizers, self.optimizer_config.lr
        require_adamw(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = peak * self._lr_factor()  # the scheduler's formula, to the last bit
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            scheduler.base_lrs = [peak] * len(optimizer.param_groups)  # the saving ranks may have had other groups
        if self.distiller is not None and not self.trainer.should_stop:
            self.distiller.start(self.gpt, self.trainer)

    @override
    def on_train_epoch_end(self) -> None:
        """Check the weights after the last step: no later loss would show that they are not finite.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        self.guard.check_weights(self.trainer.global_step, self.gpt)

    @override
    def on_train_end(self) -> None:
        """Free the teacher, which evaluation does not need, and warn of a learning rate that has not fallen to its end."""
        warn_about_rate(self.schedule, self.tokens_seen, self.train_tokens)
        if self.distiller is not None:
            self.distiller.release()

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the step number that loggers use; Lightning loses it if a run is resumed at an end."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    @override
    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity`, `val/bits_per_byte`, and each by domain."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._resuming.end_validation(self.trainer)
        super().on_validation_epoch_end()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's configuration and the clock, and set the loop's counters to the last optimizer step."""
        checkpoint |= {
            "model_config": self.config.to_dict(),
            "tokens_seen": self.tokens_seen,
            "non_finite": self.guard.state_dict(),
            "seed": self.seed,
        }
        if self.started_from is not None:
            checkpoint["started_from"] = self.started_from
        data = training_data(self.trainer)
        if data is not None and (tokenizer := data.tokenizer_json()) is not None:
            checkpoint["tokenizer"] = tokenizer
        if isinstance(self.distiller, KeepsState):
            checkpoint["distiller"] = self.distiller.state_dict()
        for scheduler in checkpoint.get("lr_schedulers", []):
            # All groups have one rate. Ranks that share experts have more groups; a checkpoint knows the two of one process.
            scheduler |= {name: scheduler[name][:2] for name in ("base_lrs", "_last_lr", "lr_lambdas")}
        self._resuming.save(checkpoint, self.trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the clock.

        Raises:
            ValueError: the checkpoint is of another model or run (the message lists the differences), has another tokenizer, or
                the run to resume has weights only. Evaluation ignores settings that only affect training.
        """
        fits = self.trainer.state.fn == TrainerFn.FITTING
        check_same_run(checkpoint, self.config, self.seed if fits else None, self.trainer.ckpt_path)
        check_tokenizer(checkpoint, training_data(self.trainer))
        self.tokens_seen = checkpoint["tokens_seen"]
        self.started_from = checkpoint.get("started_from")
        self.guard.load_state_dict(checkpoint["non_finite"])
        if fits:
            self._resuming.load(checkpoint, self.trainer)
            if isinstance(self.distiller, KeepsState):
                self.distiller.load_state_dict(checkpoint.get("distiller", {}))
        else:
            # Log where training logs a validation of this step.
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = max(checkpoint["global_step"] - 1, 0)
