"""GPTModule: a GPT in Lightning. Builds it on the strategy's ranks, and measures its loss by domain; `module.py` trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from nlgmoe.batch import Batch, loss_mask
from nlgmoe.checkpoint.agreement import AllRanksError
from nlgmoe.checkpoint.same_run import differences
from nlgmoe.checkpoint.warm_start import WarmStart, load_initial_weights
from nlgmoe.config import FREE_IN_EVALUATION, GPTConfig
from nlgmoe.data.training_data import training_data
from nlgmoe.eval.perplexity import DomainLoss, batch_losses
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.placement import ExpertPlacement, PlacesExperts
from nlgmoe.layers.router import Routing
from nlgmoe.model.compiling import compile_dense_parts
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.token_schedule import SequenceCurriculum
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.run.refusals import check_trainer
from nlgmoe.run.signals import leave_signals_to_callbacks
from nlgmoe.run_checks import check_vocabulary, require_compiler
from nlgmoe.validation import SettingError, require


class GPTModule(LightningModule):
    """Build and evaluate a GPT.

    Args:
        config: shape of the model.
        seed: seed of the initial weights.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        compile: compile attention and dense layers with `torch.compile`, at their first use.
        loss_chunk_size: tokens whose logits exist at a time.
        warm_start: initial weights from a checkpoint; None draws them.
        curriculum: lengths of the sequences in training, at most `config.seq_len`; None: whole sequences.
    """

    def __init__(
        self,
        config: GPTConfig,
        seed: int,
        activation_checkpointing: bool,
        compile: bool,
        loss_chunk_size: int,
        warm_start: WarmStart | None,
        curriculum: SequenceCurriculum | None,
    ) -> None:
        super().__init__()
        if loss_chunk_size < 1:
            raise SettingError(f"loss_chunk_size={loss_chunk_size} must be at least 1 token")
        if seed < 0:
            raise SettingError(f"seed={seed} must be at least 0")
        if curriculum is not None and curriculum.start > config.seq_len:
            raise SettingError(f"start={curriculum.start} is above the model's seq_len={config.seq_len}; lower it")
        self.config = config
        self.seed = seed
        self.activation_checkpointing = activation_checkpointing
        self.compiles = compile
        self.loss_chunk_size = loss_chunk_size
        self.warm_start = warm_start
        self.started_from: str | None = None  # the checkpoint of the warm start
        self.curriculum = curriculum
        self.model: GPT | None = None  # built by configure_model, once the strategy is ready for it
        self.routings: list[Routing] = []  # of the latest micro-batch, for callbacks to read
        self._domain_loss: list[DomainLoss] = []  # in a list, not a submodule: bf16-true would turn its sums into bf16

    @override
    def configure_model(self) -> None:
        """Build the GPT, once."""
        strategy = self._trainer.strategy if self._trainer is not None else None
        placed: Mapping[int, ExpertPlacement] = {}
        if isinstance(strategy, PlacesExperts):
            placed = strategy.expert_placements(self.config)
        if self.model is None:
            if self.compiles:
                require_compiler(self.device if strategy is None else strategy.root_device)
            model = GPT(self.config, self.seed, self.activation_checkpointing, placed)
            if self.warm_start is not None:
                self._start_from(model, self.warm_start)
            if self.compiles:
                compile_dense_parts(model)
            self.model = model
        elif not _has_placements(self.model, placed):
            raise AllRanksError(
                "this module's model was built before, with other placements of experts than trainer.strategy's; make a new "
                "MoEGPTModule for every trainer, and do not use module.gpt before fit"
            )

    def _start_from(self, model: GPT, start: WarmStart) -> None:
        """Load the initial weights, and report what differs in the configuration, such as another `top_k`."""
        data = training_data(self._trainer)
        tokenizer = None if data is None else data.tokenizer_json()
        loaded = load_initial_weights(model, start, tokenizer=tokenizer)
        self.started_from = str(loaded.path)
        changed = differences(loaded.model_config, self.config.to_dict(), ignore=FREE_IN_EVALUATION)
        rank_zero_info(loaded.report + (f"\n  model.config differed: {', '.join(changed)}" if changed else ""))

    @property
    def gpt(self) -> GPT:
        """The model; the first access builds it."""
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    @override
    def setup(self, stage: str) -> None:
        """Check that trainer, model and data fit together, and make the portable checkpoint the trainer's format."""
        check_trainer(self.trainer, stage)
        leave_signals_to_callbacks(self.trainer)
        self._domain_loss = []  # discards the sums of an interrupted evaluation
        if (data := training_data(self.trainer)) is None:
            return
        check_vocabulary(self.config, data)
        self._domain_loss = [DomainLoss(data.domains, data.token_byte_lengths(), data.domain_shares)]

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, but keep numbers on the host: Lightning would copy them to the device and back."""
        if isinstance(value, float | int) and not kwargs.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.float64, device="cpu")
        super().log(name, value, *args, **kwargs)

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one micro-batch to the loss by domain."""
        self._evaluate(batch, self.trainer.num_val_batches)

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one micro-batch to the loss by domain."""
        self._evaluate(batch, self.trainer.num_test_batches)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of every token, `[B, T]` nats; 0 where the loss is masked."""
        return self._token_losses(batch) * loss_mask(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity`, `val/bits_per_byte`, and each by domain."""
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        """Log the same under `test/`."""
        self._log_evaluation("test")

    def _token_losses(self, batch: Batch) -> Tensor:
        losses, routings = batch_losses(self.gpt, batch, self.loss_chunk_size)
        # during training, a user's callback calls this, not the step
        if self._trainer is None or not self._trainer.training:
            self.routings = routings
        return losses

    def _evaluate(self, batch: Batch, loaders: Sequence[int | float]) -> None:
        require(
            len(loaders) == 1,
            f"expected one evaluation dataloader, not {len(loaders)}: join them with torch.utils.data.ConcatDataset, and "
            "distinguish their texts by `domain` in a batch and `domains` of the data module",
        )
        if not self._domain_loss:  # another data module: one unnamed domain, no bytes
            self._domain_loss = [DomainLoss(["all"], torch.zeros(self.config.vocab_size))]
        metric = self._domain_loss[0].to(self.device)
        named = training_data(self.trainer) is not None
        domain = batch["domain"] if named else torch.zeros_like(batch["domain"])
        metric.update(self._token_losses(batch), batch["targets"], loss_mask(batch), domain)

    def _log_evaluation(self, prefix: str) -> None:
        (metric,) = self._domain_loss
        values = metric.compute()
        if self.trainer.state.fn == TrainerFn.FITTING and not torch.isfinite(values["loss"]):
            rank_zero_warn(f"step {self.trainer.global_step}: val/loss is {float(values['loss'])}")
        for name, value in values.items():
            if torch.isfinite(value) or not name.startswith("bits_per_byte"):
                # The values are equal on all ranks; sync_dist declares that to Lightning.
                self.log(f"{prefix}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
        metric.reset()


def _has_placements(model: GPT, placements: Mapping[int, ExpertPlacement]) -> bool:
    """Return whether this rank holds the experts of `placements`; a block that is not named holds all of its experts."""
    for layer, count in enumerate(experts_per_layer(model.config)):
        wanted = placements.get(layer, ExpertPlacement(first=0, count=count))
        moe = model.blocks[layer].moe
        if isinstance(moe, MoELayer) and (moe.placement.first, moe.placement.count) != (wanted.first, wanted.count):
            return False
    return True
