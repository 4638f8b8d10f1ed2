"""MoEGPTModule: how a GPT is trained. Loss, optimizer, learning rate, and the token clock."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, distributed
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from nlgmoe.batch import (
    Batch,
    HasLargestBatch,
    HasPlannedBatchSize,
    HasTokenByteLengths,
    HasTokenizer,
    TracksSamples,
    loss_mask,
    token_mask_or_none,
    truncate,
)
from nlgmoe.checkpoint.agreement import AllRanksError
from nlgmoe.checkpoint.layout import describe_differences, shapes_of, summarize_differences
from nlgmoe.checkpoint.warm_start import WarmStart, load_initial_weights
from nlgmoe.config import FREE_IN_EVALUATION, GPTConfig
from nlgmoe.device import fork_rng
from nlgmoe.distill.distiller import Distiller, KeepsState
from nlgmoe.eval.perplexity import DomainLoss
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.losses import cross_entropy, distilled_cross_entropy, token_losses
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.placement import ExpertPlacement, PlacesExperts
from nlgmoe.layers.router import Router, Routing
from nlgmoe.model.first_non_finite import first_non_finite, first_non_finite_weight
from nlgmoe.model.gpt import GPT
from nlgmoe.non_finite import HasStepGradients, LocalGradients, NonFinite, StepGradients, StepGuard
from nlgmoe.optim.param_groups import AdamWConfig, apply_settings, build_adamw
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum, learning_rate, sequence_length
from nlgmoe.parallel.same_end import require_same_end
from nlgmoe.resuming import (
    check_same_run,
    differences,
    follow_moved_folder,
    keep_patience,
    set_loop_counters,
    stopped_early,
    validate_now,
    was_validated,
)
from nlgmoe.run_checks import check_memory, check_trainer, check_vocabulary, require_compiler, warn_of_early_end
from nlgmoe.seeding import derive_seed


class MoEGPTModule(LightningModule):
    """Train a GPT: cross-entropy, the balance losses of its MoE layers, and the distillation loss if there is a teacher.

    Everything random in a step (dropout, routing noise, token selection) is a function of `seed`, the step and the
    micro-batch's index over all ranks, so that a resumed run, or another number of ranks, draws the same numbers.

    Args:
        config: shape of the model.
        optimizer: AdamW's settings.
        schedule: the learning rate over tokens.
        train_tokens: training ends when this many tokens have been fed, at the end of that step; null leaves the end to
            the trainer (`max_steps`, `max_time`).
        curriculum: train on short sequences first; null: on whole ones from the start. Evaluation is always on whole ones.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        compile: compile attention and dense layers with `torch.compile`, at the first step; for GPUs. Needs a C compiler there,
            and a C++ compiler on CPUs, where it gains nothing (docs/performance.md).
        loss_chunk_size: tokens whose logits exist at a time; memory of the head is `loss_chunk_size * vocab_size` values.
        seed: seed of the initial weights and of all that is random in training.
        warm_start: initial weights from a checkpoint; null draws them. `train.py` ignores it where `--ckpt_path` resumes a run.
        non_finite: stop or skip, for a step whose loss or gradients are NaN or infinite.
        distiller: a teacher, until `StagedDistillation` ends distillation; null: train on text alone.
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
        super().__init__()
        if train_tokens is not None and train_tokens < 1:
            raise ValueError(f"train_tokens={train_tokens} must be at least 1, or null")
        if loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size={loss_chunk_size} must be at least 1 token")
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        if schedule.min_lr > optimizer.lr:
            raise ValueError(f"min_lr={schedule.min_lr} is above the peak, model.optimizer.lr={optimizer.lr}; lower it")
        if curriculum is not None and curriculum.start > config.seq_len:
            raise ValueError(f"start={curriculum.start} is above the model's seq_len={config.seq_len}; lower it")
        self.config = config
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.train_tokens = train_tokens
        self.curriculum = curriculum
        self.activation_checkpointing = activation_checkpointing
        self.compile_dense_parts = compile
        self.loss_chunk_size = loss_chunk_size
        self.seed = seed
        self.warm_start = warm_start
        self.distiller = distiller
        self.model: GPT | None = None  # built by configure_model, once the strategy is ready for it
        self.tokens_seen = 0  # the token clock: positions fed, padding included, up to the last optimizer step
        self.routings: list[Routing] = []  # of the latest micro-batch, for callbacks to read
        self.guard = StepGuard(non_finite)
        self._window = _Window()
        self._stops_after_step = False
        self._validated_step = 0  # optimizer steps taken when the latest validation ended
        self._given_max_steps: int | None = None  # where a resumed run has taken so many
        self._learning_routers: list[tuple[int, Router]] = []  # number of the MoE layer, and its router
        self._step_samples: int | None = None  # sequences of the last optimizer step, over all ranks
        self._domain_loss: list[DomainLoss] = []  # in a list, not a submodule: bf16-true would turn its sums into bf16

    @override
    def configure_model(self) -> None:
        """Build the GPT, once.

        Raises:
            ValueError: it has been built already, with its experts elsewhere than the trainer's strategy wants them; or
                `warm_start` names no checkpoint that fits; or `compile` is set where there is no compiler.
        """
        strategy = self._trainer.strategy if self._trainer is not None else None
        placed: Mapping[int, ExpertPlacement] = {}
        if isinstance(strategy, PlacesExperts):
            placed = strategy.expert_placements(self.config)
        if self.model is None:
            if self.compile_dense_parts:
                require_compiler(self.device if strategy is None else strategy.root_device)
            model = GPT(self.config, self.seed, self.activation_checkpointing, placed)
            if self.warm_start is not None:
                self._start_from(model, self.warm_start)
            if self.compile_dense_parts:
                model.compile_dense_parts()
            self.model = model
        elif not self.model.has_placements(placed):
            raise AllRanksError(
                "this module's model was built before, with its experts elsewhere than trainer.strategy puts them; make a new "
                "MoEGPTModule for every trainer, and do not use module.gpt before fit"
            )

    def _start_from(self, model: GPT, start: WarmStart) -> None:
        """Load the initial weights, and report what differs in the configuration, such as another `top_k`."""
        data = getattr(self._trainer, "datamodule", None)
        tokenizer = data.tokenizer_json() if isinstance(data, HasTokenizer) else None
        loaded = load_initial_weights(model, start, tokenizer=tokenizer)
        changed = differences(loaded.model_config, self.config.to_dict(), ignore=FREE_IN_EVALUATION)
        rank_zero_info(loaded.report + (f"\n  model.config was another: {', '.join(changed)}" if changed else ""))

    @property
    def gpt(self) -> GPT:
        """The model; the first access builds it."""
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    @property
    def tokens_fed(self) -> int:
        """Positions fed so far, over all ranks: the token clock, and the micro-batches since the last optimizer step."""
        return self.tokens_seen + self._window.tokens * self.trainer.world_size

    @override
    def setup(self, stage: str) -> None:
        """Check that trainer, model and data fit together, and make the portable checkpoint the trainer's format.

        Raises:
            ValueError: they do not.
        """
        check_trainer(self.trainer, stage)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, HasLargestBatch):
            check_memory(self.config, self.curriculum, data, self.trainer, stage)
        if not isinstance(data, HasTokenByteLengths):
            return
        check_vocabulary(self.config, data)
        shares = getattr(data, "domain_shares", None)
        self._domain_loss = [DomainLoss(data.domains, data.token_byte_lengths(), shares)]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one micro-batch."""
        if self.curriculum is not None:
            # The clock, and with it the length, is constant within an accumulation window and the same on every rank.
            batch = truncate(batch, sequence_length(self.tokens_seen, self.config.seq_len, self.curriculum))
            self.log("train/seq_len", float(batch["tokens"].shape[1]))
        loss, losses, self.routings = self._losses(batch, len(self._window.batches))
        of_all_ranks = _mean_over_ranks(torch.stack([value.detach().float() for value in losses.values()]))
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        self.log("train/tokens", float(self.tokens_seen))
        self._window.add(batch, list(losses), of_all_ranks)
        if self._learning_routers:
            requests = [self.routings[layer].tokens_per_expert for layer, _ in self._learning_routers]
            earlier = self._window.requests or [torch.zeros_like(one) for one in requests]
            self._window.requests = [before + one for before, one in zip(earlier, requests, strict=True)]
        return loss

    def _losses(self, batch: Batch, index: int) -> tuple[Tensor, dict[str, Tensor], list[Routing]]:
        """Compute the loss of micro-batch `index` of the step, its parts by logged name, and the routings.

        A second call in the same step computes the same.
        """
        key, mask = self._noise_key(index), token_mask_or_none(batch)
        # The teacher first: its activations are freed before the student's are allocated.
        teacher = self.distiller.read(batch, mask) if self.distiller is not None else None
        with fork_rng(self.device):  # dropout draws from torch's generator: seed it for this micro-batch alone
            torch.manual_seed(derive_seed("dropout", *key))
            output = self.gpt(batch["tokens"], mask, noise_key=key, documents=batch.get("document"))
        counted = loss_mask(batch)
        arguments = (
            output.hidden.flatten(0, 1),
            self.gpt.unembedding,
            self.config.vocab_size,
            batch["targets"].flatten(),
            counted.flatten(),
            self.loss_chunk_size,
            _mean_over_ranks(counted.sum().float()),
        )
        if teacher is None:
            loss = cross_entropy(*arguments)
            losses = {"train/loss": loss}
        else:
            distilled = distilled_cross_entropy(*arguments, teacher)
            loss = distilled.loss
            losses = {
                "train/loss": distilled.language,
                "train/distillation_loss": distilled.distillation,
                "train/teacher_agreement": distilled.agreement,
            }
        if self.config.moe is not None:
            balance, z_loss = router_losses(output.routings, self.config.moe.aux_scope)
            loss = loss + self.config.moe.loss_coeff * balance + self.config.moe.z_loss_coeff * z_loss
            losses |= {"train/balance_loss": balance, "train/z_loss": z_loss}
            for name in {name: None for routing in output.routings for name in routing.losses}:
                own = [routing.losses[name] for routing in output.routings if name in routing.losses]
                losses[f"train/{name}"] = torch.stack(own).sum()
                loss = loss + losses[f"train/{name}"]
        return loss, losses, output.routings

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients, or drop them where they or the loss are not finite (`non_finite`), and log the step.

        The host reads losses and gradient norm from the device in one copy.

        Lightning calls this between the backward pass and the optimizer's step, DeepSpeed's after every micro-batch.

        Raises:
            NonFiniteError: the run is to stop.
        """
        gradients = self.step_gradients()
        if gradients is None:
            return
        window, step = self._window, self.trainer.global_step
        *losses, norm = torch.cat([window.mean_losses(), gradients.norm().to(window.losses)[None]]).tolist()
        for name, value in zip(window.names, losses, strict=True):
            self.log(name, value, prog_bar=name == "train/loss")
        self.log("train/grad_norm", norm)
        loss = sum(losses)

        def find_source() -> str:
            def losses_of(index: int) -> Iterable[Tensor]:
                with self.trainer.precision_plugin.train_step_context():
                    return self._losses(window.batches[index], index)[1].values()

            return first_non_finite(
                self.gpt, len(window.batches), losses_of, math.isfinite(loss), gradients.full_gradient
            )

        def bad_weight() -> str | None:
            return first_non_finite_weight(self.gpt)

        window.taken = self.guard.allows(step, loss, norm, gradients.can_lower_loss_scale, bad_weight, find_source)
        if not window.taken:
            gradients.discard()
        elif gradient_clip_val:
            gradients.clip(gradient_clip_val, gradient_clip_algorithm)
        self.log("train/skipped_steps", float(self.guard.skipped))

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, but keep numbers on the host: Lightning would copy them to the device and back."""
        if isinstance(value, float | int) and not kwargs.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.float64, device="cpu")
        super().log(name, value, *args, **kwargs)

    def step_gradients(self) -> StepGradients | None:
        """Return the gradients of the coming optimizer step, for `on_before_optimizer_step` and later; None if none is due."""
        trainer = self.trainer
        if isinstance(trainer.strategy, HasStepGradients):
            return trainer.strategy.step_gradients()
        return LocalGradients(self.gpt.parameters(), getattr(trainer.precision_plugin, "scaler", None))

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one micro-batch to the loss by domain."""
        self._evaluate(batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one micro-batch to the loss by domain."""
        self._evaluate(batch)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of every token, `[B, T]` nats; 0 where the loss is masked."""
        return self._token_losses(batch) * loss_mask(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity`, `val/bits_per_byte`, and each by domain."""
        self._validated_step = self.trainer.global_step
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        """Log the same under `test/`."""
        self._log_evaluation("test")

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
        world = self.trainer.world_size
        self.tokens_seen += self._window.tokens * world
        data = getattr(self.trainer, "datamodule", None)
        planned = data.planned_batch_size() if isinstance(data, HasPlannedBatchSize) else None
        if isinstance(data, TracksSamples):
            data.advance(self._window.samples * world)
        self._warn_of_another_batch(self._window.samples * world, planned)
        if self._learning_routers and self._window.taken:
            requests = torch.cat(self._window.requests)
            if distributed.is_initialized():
                distributed.all_reduce(requests)
            routers = [router for _, router in self._learning_routers]
            for router, own in zip(routers, requests.split([one.num_experts for one in routers]), strict=True):
                router.after_step(own)
        self._window = _Window()
        with warnings.catch_warnings():
            # PyTorch warns if the first step was skipped, as often in fp16; this schedule follows the clock.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            scheduler.step()
        fed = self.train_tokens is not None and self.tokens_seen >= self.train_tokens
        # Set now, so that this step is logged and validated as the last one.
        if fed or self._stops_after_step or 0 <= self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Postpone a stop within an accumulation window, such as a `Timer`'s, to the end of the step.

        Raises:
            ValueError: a callback has stopped this rank alone.
        """
        if self.trainer.should_stop and self.trainer.fit_loop.epoch_loop._should_accumulate():
            self.trainer.should_stop, self._stops_after_step = False, True
        elif self.trainer.should_stop:
            require_same_end(self.trainer.global_step)

    def _warn_of_another_batch(self, samples: int, planned: int | None) -> None:
        """Warn if a resumed run takes steps of another size, which the data module has not planned."""
        if self._step_samples not in (None, samples) and samples != planned:
            rank_zero_warn(
                f"a step had {self._step_samples} sequences when the checkpoint was saved, now it has {samples}; "
                f"data.global_batch_size={self._step_samples} keeps it the same on any number of ranks"
            )
        self._step_samples = samples

    @override
    def on_train_start(self) -> None:
        """Begin the first accumulation window.

        Optimizer settings are the configuration's, not the checkpoint's: a change takes effect on resume. A run that is
        resumed at its end is validated once more.
        """
        end, stopper = None, stopped_early(self.trainer)
        if self._given_max_steps is not None:
            self.trainer.fit_loop.epoch_loop.max_steps = self._given_max_steps
            end = f"it has taken trainer.max_steps={self._given_max_steps}; to go on, raise it"
        elif self.train_tokens is not None and self.tokens_seen >= self.train_tokens:
            end = (
                f"{self.tokens_seen} tokens of train_tokens={self.train_tokens}; to go on, raise model.train_tokens and "
                "model.schedule.decay_tokens"
            )
        elif stopper is not None and self.trainer.ckpt_path is not None:
            end = (
                f"{type(stopper).__name__}, monitor={stopper.monitor}, ended it at step {self.trainer.global_step}; to go on, "
                "raise its patience if that ran out, or remove it from trainer.callbacks"
            )
        if end is not None:
            rank_zero_warn(f"the run is at its end: {end}")
            self.trainer.should_stop = True
            validate_now(self.trainer, again=self._validated_step == self.trainer.global_step)
        warn_of_early_end(self.config, self.curriculum, self.train_tokens, self.trainer)
        self._window, self._stops_after_step = _Window(), False
        layers = [module for module in self.gpt.modules() if isinstance(module, MoELayer)]
        self._learning_routers = [(n, moe.router) for n, moe in enumerate(layers) if moe.router.learns_from_steps]
        (optimizer,), peak = self.trainer.optimizers, self.optimizer_config.lr
        apply_settings(optimizer, self.optimizer_config)
        for group in optimizer.param_groups:
            group["lr"] = peak * self._lr_factor()  # the scheduler's formula, to the last bit
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            scheduler.base_lrs = [peak] * len(optimizer.param_groups)  # the saving ranks may have had other groups
        if self.distiller is not None and not self.trainer.should_stop:
            self.distiller.start(self.gpt, self.trainer)

    @override
    def on_train_epoch_end(self) -> None:
        """Check the weights after the last step, which no loss follows.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        self.guard.check_weights(self.trainer.global_step, first_non_finite_weight(self.gpt))

    @override
    def on_train_end(self) -> None:
        """Free the teacher, which evaluation does not need."""
        if self.distiller is not None:
            self.distiller.release()

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Log at the step's number, which Lightning loses over a restart."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's shape and the clock, and set the loop's counters to the last optimizer step."""
        checkpoint |= {
            "model_config": self.config.to_dict(),
            "tokens_seen": self.tokens_seen,
            "step_samples": self._step_samples,
            "non_finite": self.guard.state_dict(),
            "seed": self.seed,
        }
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, HasTokenizer):
            checkpoint["tokenizer"] = data.tokenizer_json()
        if isinstance(self.distiller, KeepsState):
            checkpoint["distiller"] = self.distiller.state_dict()
        for scheduler in checkpoint.get("lr_schedulers", []):
            # All groups have one rate. Ranks that share experts have more groups; a checkpoint knows the two of one process.
            scheduler |= {name: scheduler[name][:2] for name in ("base_lrs", "_last_lr", "lr_lambdas")}
        if checkpoint["global_step"] == 0:
            del checkpoint["loops"]  # nothing has been trained on: to resume is to start
        else:
            validated = self._validated_step == checkpoint["global_step"]
            set_loop_counters(checkpoint, self.trainer.accumulate_grad_batches, validated)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the clock.

        Raises:
            ValueError: the checkpoint is of another model or run, whose differences the message names, or the run to resume
                has weights only. Evaluation ignores settings that only affect training.
        """
        fits = self.trainer.state.fn == TrainerFn.FITTING
        check_same_run(checkpoint, self.config, self.seed if fits else None, self.trainer.ckpt_path)
        self.tokens_seen, self._step_samples = checkpoint["tokens_seen"], checkpoint["step_samples"]
        self.guard.load_state_dict(checkpoint["non_finite"])
        if fits:
            keep_patience(checkpoint, self.trainer)
            follow_moved_folder(checkpoint, self.trainer)
            if isinstance(self.distiller, KeepsState):
                self.distiller.load_state_dict(checkpoint.get("distiller", {}))
        if fits and "loops" in checkpoint:
            step, validated = checkpoint["global_step"], was_validated(checkpoint)
            self._validated_step = step if validated else 0
            # A step may have more or fewer micro-batches from here on.
            set_loop_counters(checkpoint, self.trainer.accumulate_grad_batches, validated)
            if 0 <= self.trainer.max_steps <= step:
                self._given_max_steps = self.trainer.max_steps
                self.trainer.fit_loop.epoch_loop.max_steps = -1  # else Lightning ends before `on_train_start`

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as PyTorch does, with an error of one line.

        Raises:
            ValueError: parameters are missing, unknown or of another shape.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            different = summarize_differences(describe_differences(shapes_of(self.state_dict()), shapes_of(state_dict)))
            raise ValueError(f"the checkpoint does not fit the model: {different}; use another checkpoint") from error

    def _noise_key(self, index: int) -> tuple[int, int, int]:
        """(seed, step, index within the step over all ranks), from the index on this rank."""
        trainer = self.trainer
        return self.seed, trainer.global_step, index * trainer.world_size + trainer.global_rank

    def _token_losses(self, batch: Batch) -> Tensor:
        output = self.gpt(batch["tokens"], token_mask_or_none(batch), documents=batch.get("document"))
        self.routings = output.routings
        losses = token_losses(
            output.hidden.flatten(0, 1),
            self.gpt.unembedding,
            self.config.vocab_size,
            batch["targets"].flatten(),
            self.loss_chunk_size,
        )
        return losses.view_as(batch["targets"])

    def _evaluate(self, batch: Batch) -> None:
        if not self._domain_loss:  # another data module: one unnamed domain, no bytes
            self._domain_loss = [DomainLoss(["all"], torch.zeros(self.config.vocab_size))]
        metric = self._domain_loss[0].to(self.device)
        metric.update(self._token_losses(batch), batch["targets"], loss_mask(batch), batch["domain"])

    def _log_evaluation(self, prefix: str) -> None:
        (metric,) = self._domain_loss
        values = metric.compute()
        if self.trainer.state.fn == TrainerFn.FITTING and not torch.isfinite(values["loss"]):
            rank_zero_warn(f"step {self.trainer.global_step}: val/loss is {float(values['loss'])}")
        for name, value in values.items():
            if torch.isfinite(value) or not name.startswith("bits_per_byte"):
                # Every rank has the same value already; sync_dist tells Lightning so.
                self.log(f"{prefix}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
        metric.reset()


class _Window:
    """The micro-batches of this rank since the last optimizer step, and their losses over all ranks, on the device."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.samples = self.tokens = 0
        self.names: list[str] = []  # that the losses are logged under
        self.losses = torch.zeros(0)  # [names], sum over micro-batches
        self.requests: list[Tensor] = []  # [E] of this rank, of each router that learns from steps
        self.taken = False  # the optimizer's step has been, or is about to be, taken

    def add(self, batch: Batch, names: list[str], losses: Tensor) -> None:
        """Count one micro-batch."""
        self.losses = self.losses + losses if self.batches else losses
        self.names = names
        self.batches.append(batch)
        self.samples += batch["tokens"].shape[0]
        self.tokens += batch["tokens"].numel()

    def mean_losses(self) -> Tensor:
        """Return the mean over micro-batches, `[names]`."""
        return self.losses / len(self.batches)


def _mean_over_ranks(value: Tensor) -> Tensor:
    """Average `value` over ranks, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value
