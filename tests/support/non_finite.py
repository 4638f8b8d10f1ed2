"""Values that are not finite, where a test wants them."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nlgmoe.model.gpt import GPT

Undo = Callable[[], object]


class Spoils(Callback):
    """Spoils the model for some steps, and keeps losses, learning rates and what was logged of every step."""

    def __init__(self, steps: set[int], spoil: Callable[[GPT, Tensor], Undo]) -> None:
        self.steps, self.spoil = steps, spoil
        self.undo: Undo = lambda: None
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.before: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps and batch_idx % trainer.accumulate_grad_batches == 0:
            self.undo = self.spoil(pl_module.gpt, batch["tokens"])
            self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.undo()
            self.undo = lambda: None
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def output_of(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[GPT, Tensor], Undo]:
    """What a part of the model computes."""
    return lambda gpt, tokens: gpt.get_submodule(part).register_forward_hook(lambda m, i, out: change(out)).remove
