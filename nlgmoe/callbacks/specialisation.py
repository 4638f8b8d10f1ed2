"""Expert specialisation by domain and token class, written at validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from nlgmoe.batch import Batch, HasTokenByteLengths, HasTokenTexts
from nlgmoe.eval.expert_counts import ExpertCounts
from nlgmoe.eval.specialisation import remove_later
from nlgmoe.module import MoEGPTModule
from nlgmoe.pyramid import moe_blocks
from nlgmoe.resuming.branches import first_step_left


class ExpertSpecialisation(Callback):
    """Writes `specialisation.safetensors` after each validation in `fit`; `nlgmoe report` reads it.

    A run that goes back removes the file of a later step, or of another branch. Every rank counts its own windows; one
    collective sums the counts at the end. A dense model has no such file.
    """

    def __init__(self) -> None:
        self._counts: ExpertCounts | None = None
        self._first_step: int | None = None  # from which a file is not of a resumed run; None: it is

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        self._first_step = None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find out which files are of another branch of the run."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero:
            self._first_step = first_step_left(Path(trainer.default_root_dir), checkpoint)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remove a file of another branch, once nothing has refused the run."""
        self._remove_other(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove it, if no step was taken."""
        self._remove_other(trainer)

    def _remove_other(self, trainer: Trainer) -> None:
        if self._first_step is not None:
            remove_later(trainer.default_root_dir, self._first_step)
            self._first_step = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting, in `fit`."""
        assert isinstance(pl_module, MoEGPTModule)
        self._counts = None
        experts = list(moe_blocks(pl_module.config).values())
        if not experts or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        data = getattr(trainer, "datamodule", None)
        domains = data.domains if isinstance(data, HasTokenByteLengths) else ["all"]
        spellings = data.token_spellings() if isinstance(data, HasTokenTexts) else None
        self._counts = ExpertCounts(experts, domains, spellings).to(pl_module.device)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        assert isinstance(pl_module, MoEGPTModule)
        if self._counts is not None:
            self._counts.update(batch["tokens"], batch["domain"], pl_module.routings)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over ranks, and write on rank 0."""
        if self._counts is None:
            return
        found = self._counts.specialisation(trainer.global_step)
        if trainer.is_global_zero:
            found.save(trainer.default_root_dir)
        self._counts = self._first_step = None
