"""MoEGPTModule, the LightningModule: builds a GPT on the strategy's ranks, trains it, and measures its loss by domain.

`step.py` has the steps of training and their hooks, `loss.py` the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from nlgmoe.batch import Batch, loss_mask
from nlgmoe.checkpoint.entries import entry_shapes
from nlgmoe.checkpoint.portable import use_portable_checkpoints
from nlgmoe.config import GPTConfig
from nlgmoe.data.training_data import training_data
from nlgmoe.distill.distiller import Distiller
from nlgmoe.eval.perplexity import Evaluation, batch_losses
from nlgmoe.layers.attention import AttentionContext
from nlgmoe.lightning_state import data_module_of, leave_signals_to_callbacks, set_loggers_step, trainer_of
from nlgmoe.model.gpt import GPT, Block
from nlgmoe.non_finite import NonFinite
from nlgmoe.optim.optimizer import AdamWConfig, build_optimizer, freeze
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.parallel.triton_grouped_gemm import set_triton_grouped_gemm
from nlgmoe.parts import IGNORED_IN_EVALUATION
from nlgmoe.pyramid import ExpertPlacement, PlacesExperts
from nlgmoe.ranks import AllRanksError
from nlgmoe.run import checks
from nlgmoe.step import TrainingStep
from nlgmoe.surgery.warm_start import WarmStart, load_initial_weights
from nlgmoe.validation import list_differences, require
from nlgmoe.without_effect import without_effect


class MoEGPTModule(TrainingStep):
    """Train a GPT: cross-entropy, the balance losses of its MoE layers, and the distillation loss if there is a teacher.

    The random draws of a step (dropout, routing noise, token selection) are a function of `seed`, the step and the
    micro-batch's index over all ranks: a resumed run, or another number of ranks, draws the same numbers.

    Args:
        config: shape of the model.
        optimizer: settings of AdamW, and of Muon.
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
        super().__init__(optimizer, schedule, train_tokens, curriculum, loss_chunk_size, seed, non_finite, distiller)
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.compiles = compile
        self.warm_start = warm_start
        self.started_from: str | None = None  # the checkpoint of the warm start
        self.family: str | None = None  # of transformers, that its model was imported from
        self.model: GPT | None = None  # built by configure_model, once the strategy is ready for it
        self._sharded: dict[int, tuple[int, int]] = {}  # first and number of this rank's experts, by block
        self._evaluation: Evaluation | None = None

    @override
    def setup(self, stage: str) -> None:
        """Forget data of an earlier call, make the portable checkpoint the trainer's format, and check that all fits together."""
        trainer: Any = self.trainer
        trainer.datamodule = data_module_of(trainer)  # not an earlier call's, whose state Lightning would save
        use_portable_checkpoints(self.trainer.strategy, to_train=stage == "fit")
        checks.check_trainer(self.trainer, stage)
        leave_signals_to_callbacks(self.trainer)
        checks.check_lengths(self.config, self.seq_len, self.curriculum if stage == "fit" else None)
        data = training_data(self.trainer)
        if data is not None:
            checks.check_vocabulary(self.config, data)
        self._evaluation = Evaluation(data, self.config.vocab_size)

    @override
    def configure_model(self) -> None:
        trainer = trainer_of(self)
        strategy = trainer.strategy if trainer is not None else None
        placed: Mapping[int, ExpertPlacement] = {}
        if isinstance(strategy, PlacesExperts):
            placed = strategy.expert_placements(self.config)
        sharded = {block: (place.first, place.count) for block, place in placed.items() if place.group is not None}
        if self.model is None:
            model = GPT(self.config, self.seed, self.activation_checkpointing, placed)
            entry_shapes(model), self.config.to_dict()  # refuse what no checkpoint could hold
            freeze(model, self.optimizer_config.frozen)
            if self.warm_start is not None:
                self._start_from(model, self.warm_start)
            if self.compiles:
                compile_dense_parts(model)
            self.model, self._sharded = model, sharded
        elif sharded != self._sharded:
            problem = "this module's model was built before, with other placements of experts than trainer.strategy's"
            remedy = "make a new MoEGPTModule for every trainer, and do not use module.gpt before fit"
            raise AllRanksError(f"{problem}; {remedy}")
        if strategy is not None:
            set_triton_grouped_gemm(self.model, strategy.root_device)

    def _start_from(self, model: GPT, start: WarmStart) -> None:
        """Load the initial weights, and report what differs in the configuration, such as another `top_k`."""
        data = training_data(trainer_of(self))
        tokenizer = None if data is None else data.tokenizer
        files = None if tokenizer is None else tokenizer.files
        loaded = load_initial_weights(model, start, tokenizer=files)
        self.started_from, self.family = str(loaded.path), loaded.family
        changed = list_differences(loaded.model_config, self.config.to_dict(), IGNORED_IN_EVALUATION)
        rank_zero_info(loaded.report + (f"\n  model.config differed: {', '.join(changed)}" if changed else ""))

    @property
    @override
    def gpt(self) -> GPT:
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    @override
    def configure_optimizers(self) -> Any:
        """Build the optimizer with named groups; each step sets their rates by the token clock, without Lightning's scheduler."""
        return build_optimizer(self.gpt, self.optimizer_config)

    @override
    def on_fit_start(self) -> None:
        """Set training mode: an interrupted validation leaves the model in evaluation mode."""
        self.train()
        if line := without_effect(self.config):
            rank_zero_warn(line)
        # Otherwise Lightning ends before `on_train_start`; `Resuming.begin` checks a `Timer` again.
        self.trainer.should_stop = False

    @override
    def on_train_start(self) -> None:
        """Begin the first accumulation window.

        Optimizer settings are those of the configuration, not of the checkpoint: a change takes effect on resume. A run
        that is resumed at its end is validated again.
        """
        checks.check_new_run(self.trainer, self.tokens_seen)
        self.resuming.begin(self.trainer, self.tokens_seen, self.train_tokens, self.config.moe)
        checks.warn_about_end(self.seq_len, self.curriculum, self.schedule, self.train_tokens, self.trainer)
        checks.check_optimizer(self.trainer)
        self.begin_steps()
        if self.distiller is not None and not self.trainer.should_stop:
            self.distiller.start(self.gpt, self.trainer)

    @override
    def on_train_epoch_end(self) -> None:
        """Check the weights after the last step: no later loss would show that they are not finite."""
        self.guard.check_weights(self.trainer.global_step, self.gpt)

    @override
    def on_train_end(self) -> None:
        """Free the teacher, which evaluation does not need."""
        self.clock.stop("run")
        if self.distiller is not None:
            self.distiller.release()

    # ---- evaluation

    @override
    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.clock.start("validation")

    @override
    def on_validation_end(self) -> None:
        self.clock.stop("validation")
        self.clock.start("data")

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, self.trainer.num_val_batches)

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, self.trainer.num_test_batches)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of every token, `[B, T]` nats; 0 where the loss is masked."""
        return self._token_losses(batch) * loss_mask(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity`, `val/bits_per_byte`, and each by domain."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.resuming.validated = self.trainer.global_step
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _token_losses(self, batch: Batch) -> Tensor:
        losses, routings = batch_losses(self.gpt, batch, self.loss_chunk_size)
        # during training, a user's callback calls this, not the step
        trainer = trainer_of(self)
        if trainer is None or not trainer.training:
            self.routings = routings
        return losses

    def _evaluate(self, batch: Batch, loaders: Sequence[int | float]) -> None:
        remedy = "join them with torch.utils.data.ConcatDataset, and distinguish their texts by `domain` in a batch"
        require(len(loaders) == 1, f"expected one evaluation dataloader, not {len(loaders)}: {remedy}")
        assert self._evaluation is not None
        self._evaluation.update(self._token_losses(batch), batch)

    def _log_evaluation(self, prefix: str) -> None:
        assert self._evaluation is not None
        values = self._evaluation.compute()
        if self.trainer.state.fn == TrainerFn.FITTING and not torch.isfinite(values["loss"]):
            rank_zero_warn(f"step {self.trainer.global_step}: val/loss is {float(values['loss'])}")
        for name, value in values.items():
            if torch.isfinite(value) or not name.startswith("bits_per_byte"):
                # Equal on all ranks: sync_dist says so to Lightning, whose "max" has half of the collectives of "mean".
                self.log(f"{prefix}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True, reduce_fx="max")

    # ---- checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's configuration and the clock, and set the loop's counters to the last optimizer step."""
        checkpoint |= {
            "model_config": self.config.to_dict(),
            "tokens_seen": self.tokens_seen,
            "non_finite": self.guard.state_dict(),
            "clock": self.clock.state_dict(),
            "seed": self.seed,
            "frozen": sorted(self.optimizer_config.frozen),
        }
        if self.optimizer_config.muon is not None:
            checkpoint["muon"] = True
        origin = {"started_from": self.started_from, "family": self.family}
        checkpoint |= {name: value for name, value in origin.items() if value is not None}
        data = training_data(self.trainer)
        if data is not None and data.tokenizer is not None:
            checkpoint["tokenizer"] = data.tokenizer.files
        if self.distiller is not None:
            checkpoint["distiller"] = self.distiller.state_dict()
        self.resuming.save(checkpoint, self.trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fits = self.trainer.state.fn == TrainerFn.FITTING
        checks.check_same_run(checkpoint, self.config, self.seed if fits else None, self.trainer.ckpt_path)
        checks.check_tokenizer(checkpoint, training_data(self.trainer))
        self.tokens_seen = checkpoint["tokens_seen"]
        self.started_from, self.family = checkpoint.get("started_from"), checkpoint.get("family")
        self.guard.load_state_dict(checkpoint["non_finite"])
        if fits:
            checks.check_moments(checkpoint, self.optimizer_config.frozen, self.optimizer_config.muon is not None)
            self.clock.load_state_dict(checkpoint["clock"])
            self.resuming.load(checkpoint, self.trainer)
            if self.distiller is not None:
                self.distiller.load_state_dict(checkpoint.get("distiller", {}))
        else:
            # Log where training logs a validation of this step.
            set_loggers_step(self.trainer, max(checkpoint["global_step"] - 1, 0))


def compile_dense_parts(model: GPT) -> None:
    """Compile attention and the dense feed-forward layers, whose shapes do not depend on the routing, at their first use.

    Attention with a cache stays uncompiled: its shapes change with every token. Compiled dropout draws other random numbers.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        vars(block)["attend"] = _compiled_unless_cached(block.attend)
        if block.moe is None:
            vars(block)["feed_forward"] = torch.compile(block.feed_forward)


def _compiled_unless_cached(attend: Callable[[Tensor, AttentionContext], Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(attend)
    return lambda x, context: attend(x, context) if context.cache is not None else compiled(x, context)
