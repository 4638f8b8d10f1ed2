"""Sequences that grow, and what the model is fed."""

from typing import Any

from lightning.pytorch.callbacks import Callback

from nlgmoe.optim.token_schedule import SequenceCurriculum

CURRICULUM = SequenceCurriculum(tokens=96, start=4, increment=4)
# Of steps of 4 sequences: clocks 0, 16, 32, 64, 112, and 4 + 12 * clock / 96 rounded down to a multiple of 4.
LENGTHS = [4, 4, 8, 12, 16, 16]
CLOCKS = [0, 16, 32, 64, 112, 176, 240]


class Fed(Callback):
    """Lengths that the model reads, by step and in validation; the learning rate and the clock of each step."""

    def __init__(self) -> None:
        self.lengths: dict[bool, list[int]] = {True: [], False: []}  # in training or not
        self.rates: list[float] = []
        self.clocks: list[int] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        lengths = self.lengths
        pl_module.gpt.register_forward_pre_hook(lambda _, args: lengths[trainer.training].append(args[0].shape[1]))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.clocks.append(pl_module.tokens_seen)
