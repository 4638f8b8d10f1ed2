"""The progress bar: position in tokens, tokens per second, time left, loss and learning rate."""

import io
import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from nlgmoe.module import MoEGPTModule


class TokenProgressBar(TQDMProgressBar):
    """Lightning's progress bar in tokens, since a curriculum changes the tokens of a batch.

    The bar has a total if the run ends at a number of tokens or steps: at the one that comes first. If standard output is a file,
    it is updated every ten seconds; bars of evaluation are not. It shows the loss, the validation loss and the learning rate, no
    metric of other code.

    Args:
        refresh_rate: micro-batches between updates; 0 hides the bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._validation: dict[str, str] = {}  # metrics of the latest validation

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        bar, module = self.train_progress_bar, _module(trainer)
        bar.unit, bar.unit_scale, bar.total = " tok", True, module.train_tokens
        bar.initial = bar.n = module.tokens_seen
        bar.set_description("Training")
        if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
            bar.mininterval = 10.0  # seconds: a file or a pipe keeps all updates

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keep the bar: it spans the run, not an epoch."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module, bar = _module(trainer), self.train_progress_bar
        if trainer.max_steps > 0 and trainer.global_step > 0:  # later steps may have more tokens
            of_steps = module.tokens_seen * trainer.max_steps // trainer.global_step
            bar.total = of_steps if module.train_tokens is None else min(of_steps, module.train_tokens)
        if self.is_enabled and (batch_idx + 1) % self.refresh_rate == 0:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            if bar.total is not None:
                # The last step may exceed the total; tqdm would then discard the total.
                bar.total = max(bar.total, module.tokens_seen)
            bar.update(module.tokens_seen - bar.n)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the validation loss from the device once, not at every update."""
        if (loss := trainer.callback_metrics.get("val/loss")) is not None:
            self._validation = {"val_loss": f"{float(loss):.3f}"}
        super().on_validation_end(trainer, pl_module)

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        loss = _module(trainer).losses.get("train/loss")
        lr = f"{_module(trainer).learning_rate:.2e}" if trainer.optimizers else ""
        return ({} if loss is None else {"loss": f"{loss:.3f}"}) | self._validation | {"lr": lr}


def _module(trainer: Trainer) -> MoEGPTModule:
    assert isinstance(trainer.lightning_module, MoEGPTModule)
    return trainer.lightning_module
