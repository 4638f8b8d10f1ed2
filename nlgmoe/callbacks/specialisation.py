"""Expert specialisation by domain and token class, written at validation."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.checkpoint.reading import holds_run
from nlgmoe.data.training_data import training_data
from nlgmoe.eval.specialisation import ExpertCounts
from nlgmoe.module import MoEGPTModule
from nlgmoe.pyramid import moe_blocks
from nlgmoe.ranks import of_rank_zero


class ExpertSpecialisation(Callback):
    """Writes `specialisation.safetensors` after each validation in `fit`; `nlgmoe report` reads it.

    `validate` writes it too, in a folder without a run, such as an imported model's. Every rank counts its own windows; one
    collective sums the counts at the end. A dense model has no such file.
    """

    def __init__(self) -> None:
        self._counts: ExpertCounts | None = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        self._counts = None
        experts = list(moe_blocks(pl_module.config).values())
        writes = trainer.state.fn == TrainerFn.FITTING or not of_rank_zero(holds_run(Path(trainer.default_root_dir)))
        if not experts or not writes or trainer.sanity_checking:
            return
        data = training_data(trainer)
        tokenizer = None if data is None else data.tokenizer
        domains = ["all"] if data is None else data.domains
        spellings = None if tokenizer is None else tokenizer.spellings
        self._counts = ExpertCounts(experts, domains, spellings).to(pl_module.device)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        if self._counts is not None:
            self._counts.update(batch["tokens"], batch["domain"], pl_module.routings)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._counts is None:
            return
        step = trainer.global_step if trainer.state.fn == TrainerFn.FITTING else None
        specialisation = self._counts.specialisation(step)
        if trainer.is_global_zero:
            specialisation.save(trainer.default_root_dir)
        self._counts = None
