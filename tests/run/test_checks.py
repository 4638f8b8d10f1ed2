"""Options and callbacks of Lightning with which a run would be wrong without an error."""

from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from nlgmoe.checkpoint.portable import use_portable_checkpoints
from nlgmoe.module import MoEGPTModule
from nlgmoe.run.checks import check_trainer
from tests.support.synthetic import SyntheticData
from tests.support.trainers import CONFIG


def trainer(folder: Path, **settings: Any) -> Trainer:
    return Trainer(default_root_dir=folder, accelerator="cpu", **({"logger": False} | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_steps": 2}, "trainer.min_steps=2 continues a run after its end"),
        ({"val_check_interval": "00:01:00:00"}, "val_check_interval as a time depends on"),
        ({"gradient_clip_algorithm": "value"}, "clipped to a norm alone; use norm"),
        ({"precision": "16-true"}, "trainer.precision=16-true does not train here; use bf16-mixed"),
        ({"plugins": [AsyncCheckpointIO()]}, "AsyncCheckpointIO writes checkpoints that no run here"),
        ({"callbacks": [type("Frozen", (BaseFinetuning,), {})()]}, "Frozen changes weights, batch or optimizer"),
        ({"callbacks": [ModelCheckpoint(save_on_exception=True)]}, "saves within a step"),
    ],
)
def test_trainer_settings_that_spoil_a_run_are_refused_with_the_reason(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, **settings)
    with pytest.raises(ValueError, match=words):
        use_portable_checkpoints(run.strategy, to_train=True)
        check_trainer(run, "fit")


def test_strategy_that_cannot_train_the_model_is_refused(tmp_path: Path) -> None:
    for strategy in (FSDPStrategy, DeepSpeedStrategy):
        run = trainer(tmp_path)
        run._accelerator_connector.strategy = strategy()
        with pytest.raises(ValueError, match=f"trainer.strategy={strategy.__name__} "):
            check_trainer(run, "validate")


class WithScheduler(MoEGPTModule):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [ConstantLR(optimizer)]


class OfItsOwn(MoEGPTModule):
    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("module", "words"), [(WithScheduler, "a learning-rate scheduler, but"), (OfItsOwn, "SGD, but")]
)
def test_what_configure_optimizers_may_not_return_is_refused(module: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^configure_optimizers returns {words} "):
        trainer(tmp_path, max_steps=1).fit(module(CONFIG), SyntheticData())
