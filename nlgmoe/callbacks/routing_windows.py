"""The choices of experts in the same text at every validation: for which domains, and how early they settle (saturation)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.data.training_data import training_data
from nlgmoe.eval.trace import TraceFacts, TraceWriter
from nlgmoe.module import MoEGPTModule
from nlgmoe.pyramid import moe_blocks
from nlgmoe.validation import require

FOLDER = "routing"  # in the run folder


class RoutingWindows(Callback):
    """Writes the trace of each domain's first validation windows on rank 0, `routing/step-N.safetensors`, after N steps of `fit`.

    The report draws which domains choose an expert, and the share of choices in common with the last validation. No text is
    routed for it but the validation's.

    Args:
        tokens: tokens of each domain, rounded up to whole windows, about 10 bytes each; 0: write nothing.
    """

    def __init__(self, tokens: int = 4096) -> None:
        require(tokens >= 0, f"tokens={tokens} must be at least 0; 0 writes nothing")
        self.tokens = tokens
        self._writer: TraceWriter | None = None
        self._counts: Counter[int] = Counter()  # tokens of each domain

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the files of steps that are to be taken again."""
        if trainer.is_global_zero:
            for step, file in recorded(Path(trainer.default_root_dir)).items():
                if step > trainer.global_step:
                    file.unlink()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        config, data = pl_module.config, training_data(trainer)
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if not (moe_blocks(config) and self.tokens and fits and trainer.is_global_zero):
            return
        domains = ["all"] if data is None else data.domains
        step, eod_id = trainer.global_step, -1 if data is None or data.tokenizer is None else data.tokenizer.eod_id
        facts = TraceFacts.of(config, domains, step=step)
        file = Path(trainer.default_root_dir) / FOLDER / f"step-{step}.safetensors"
        self._writer, self._counts = TraceWriter(file, facts, eod_id).__enter__(), Counter()

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        if self._writer is None:
            return
        mask, wanted = batch["token_mask"].clone(), False  # [B, T]
        for row, domain in enumerate(batch["domain"].tolist()):
            if self._counts[domain] < self.tokens:
                self._counts[domain] += int(mask[row].sum())
                wanted = True
            else:
                mask[row] = False
        if wanted:
            self._writer.add({**batch, "token_mask": mask}, pl_module.routings)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None


def recorded(run: Path) -> dict[int, Path]:
    """Return the traces of a run folder by step, in order."""
    files = {int(file.stem.removeprefix("step-")): file for file in (run / FOLDER).glob("step-*.safetensors")}
    return dict(sorted(files.items()))
