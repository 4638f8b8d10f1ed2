"""Staged distillation: end distillation before the end of the run."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from nlgmoe.distill.distiller import End
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.token_schedule import distillation_weight
from nlgmoe.validation import SettingError, require


class StagedDistillation(Callback):
    """Ends distillation before the run ends, since it helps early and hurts late (paper, section 4.2.1).

    Then frees the teacher; training continues without it. A step's loss weight is a function of the step or token
    count at its beginning, so resuming needs no state.

    Args:
        step: distillation ends after this many optimizer steps.
        tokens: distillation ends with the first step that begins at or after this many tokens.
        fraction: distillation ends with the first step that begins at or after this fraction of `model.train_tokens` tokens.
        ramp_tokens: the weight falls linearly to 0 over this many tokens before the end; 0: at once. Not with `step`.
    """

    def __init__(
        self, step: int | None = None, tokens: int | None = None, fraction: float | None = None, ramp_tokens: int = 0
    ) -> None:
        given = {"step": step, "tokens": tokens, "fraction": fraction}
        settings = ", ".join(f"{name}={value}" for name, value in given.items())
        chosen = {name: value for name, value in given.items() if value is not None}
        require(len(chosen) == 1, f"StagedDistillation: {settings}; give one of them, and only one")
        for name, value in chosen.items():
            require(value > 0, f"StagedDistillation: {name}={value} must be above 0; or set model.distiller to null")
        allowed = fraction is None or fraction <= 1
        require(allowed, f"StagedDistillation: fraction={fraction} must be at most 1, the whole run")
        ramp = f"StagedDistillation: ramp_tokens={ramp_tokens}"
        allowed = ramp_tokens == 0 or (ramp_tokens > 0 and step is None)
        require(allowed, f"{ramp} must be at least 0, and 0 with step; use tokens or fraction")
        require(tokens is None or ramp_tokens <= tokens, f"{ramp} is above tokens={tokens}; lower it")
        self.step, self.tokens, self.fraction, self.ramp_tokens = step, tokens, fraction, ramp_tokens

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        if stage != "fit":
            return
        if pl_module.distiller is None:
            rank_zero_warn("StagedDistillation has nothing to do: model.distiller is null, training is on text alone")
        elif self.fraction is not None:
            end = self.distillation_end(pl_module.train_tokens)
            if end.tokens is not None and self.ramp_tokens > end.tokens:
                share = f"fraction={self.fraction} of {pl_module.train_tokens} train_tokens"
                raise SettingError(f"StagedDistillation: ramp_tokens={self.ramp_tokens} is above {share}; lower it")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the weight before the module loads its teacher: at weight 0 no teacher is loaded."""
        assert isinstance(pl_module, MoEGPTModule)
        if pl_module.distiller is not None:
            pl_module.distiller.loss_weight = self._weight(trainer, pl_module)
            end = self.distillation_end(pl_module.train_tokens)
            place = f"{end.tokens:,} tokens" if end.tokens is not None else f"{end.steps:,} steps"
            rank_zero_info(f"distillation ends after {place}")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Set the weight, which is constant within an accumulation window; free the teacher at weight 0."""
        assert isinstance(pl_module, MoEGPTModule)
        distiller = pl_module.distiller
        if distiller is None:
            return
        distiller.loss_weight = self._weight(trainer, pl_module)
        if distiller.loss_weight == 0 and distiller.release():
            rank_zero_info(f"step {trainer.global_step:,}: distillation has ended, the teacher is freed")

    def distillation_end(self, train_tokens: int | None) -> End:
        """Return the end of distillation in a run of `train_tokens`.

        Raises:
            SettingError: `fraction` is set, and `train_tokens` is None.
        """
        if self.fraction is None:
            return End(self.tokens, self.step)
        if train_tokens is None:
            problem = f"fraction={self.fraction} is of model.train_tokens, which is null"
            raise SettingError(f"StagedDistillation: {problem}; set it, or use step or tokens")
        return End(round(self.fraction * train_tokens), None)

    def _weight(self, trainer: Trainer, module: MoEGPTModule) -> float:
        end = self.distillation_end(module.train_tokens)
        if end.steps is not None:
            return distillation_weight(trainer.global_step, end.steps)
        assert end.tokens is not None
        return distillation_weight(module.tokens_seen, end.tokens, self.ramp_tokens)
