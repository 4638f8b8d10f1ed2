"""Options and callbacks of Lightning with which a run would be wrong without an error."""

from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from nlgmoe.parallel.strategy import ExpertParallelStrategy
from nlgmoe.run.refusals import check_trainer

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "min_steps": ({"min_steps": 2}, "trainer.min_steps=2 keeps a run going"),
    "min_epochs": ({"min_epochs": 2}, "trainer.min_epochs=2 keeps a run going"),
    "overfit_batches": ({"overfit_batches": 2}, "trainer.overfit_batches=2 changes the order"),
    "fp16 alone": ({"precision": "16-true"}, "trainer.precision=16-true trains in fp16 alone"),
    "another format": ({"plugins": [AsyncCheckpointIO()]}, "AsyncCheckpointIO writes checkpoints that no run here"),
    "accumulation": ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "changes the batch that"),
    "finetuning": ({"callbacks": [type("Frozen", (BaseFinetuning,), {})()]}, "Frozen changes optimizer groups"),
    "rates": ({"callbacks": [LearningRateFinder()]}, "sets the rate of one optimizer group"),
    "averages": ({"callbacks": [WeightAveraging()]}, "replaces the weights that a resumed run needs"),
    "exceptions": ({"callbacks": [OnExceptionCheckpoint(".")]}, "saves within a step"),
    "exception saved": (
        {"callbacks": [ModelCheckpoint(save_on_exception=True)]},
        "save_on_exception saves within a step",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    settings, words = REFUSED[name]
    run = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, **settings)
    with pytest.raises(ValueError, match=words):
        check_trainer(run, "fit")


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_cannot_train_it_are_refused(strategy: type[Any], tmp_path: Path) -> None:
    run = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    run._accelerator_connector.strategy = strategy()
    with pytest.raises(ValueError, match=f"trainer.strategy={strategy.__name__} "):
        check_trainer(run, "validate")


def test_clipping_by_value_is_nothing_that_deepspeed_does(tmp_path: Path) -> None:
    run = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, gradient_clip_algorithm="value")
    check_trainer(run, "fit")
    run._accelerator_connector.strategy = ExpertParallelStrategy()
    with pytest.raises(ValueError, match=r"gradient_clip_algorithm=value is nothing that DeepSpeed does"):
        check_trainer(run, "fit")


def test_a_logger_that_uploads_files_is_refused(tmp_path: Path) -> None:
    run = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=WandbLogger(log_model=True))
    with pytest.raises(ValueError, match=r"^trainer.logger: WandbLogger.log_model=True takes checkpoints that"):
        check_trainer(run, "fit")
