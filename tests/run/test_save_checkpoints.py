"""`SaveCheckpoints`: which checkpoints stay, and which is the best."""

import os
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from nlgmoe.callbacks import SaveCheckpoints
from nlgmoe.checkpoint.run_checkpoints import saved_steps
from tests.support.run_folders import fit


class Score(Callback):
    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.log("score", self.scores[trainer.global_step // 4 - 1])


@pytest.mark.parametrize(
    ("save", "scores", "steps", "best"),
    [
        ({}, [3, 2, 1, 4], [12, 15, 16], 12),
        ({"mode": "max"}, [3, 2, 1, 4], [15, 16], 16),
        ({"keep": 1, "every_n_steps": None}, [1, float("nan"), 1, 2], [4, 16], 4),
        ({"keep": 1, "milestones": 6}, [3, 2, 1, 4], [6, 12, 16], 12),
        ({"keep": 1, "save_before_validation": False}, [1, 2, 3, 4], [12, 16], 12),  # of those that are saved
    ],
)
def test_save_checkpoints_keeps_the_last_the_best_and_milestones(
    save: dict[str, Any], scores: list[float], steps: list[int], best: int, tmp_path: Path
) -> None:
    trainer = fit(tmp_path, Score(*scores), save={"monitor": "score"} | save, max_steps=16)
    assert saved_steps(tmp_path) == steps
    links = {link.name: os.readlink(link) for link in (tmp_path / "checkpoints").glob("*.ckpt") if link.is_symlink()}
    assert links == {"last.ckpt": "step-16.ckpt", "best.ckpt": f"step-{best}.ckpt"}
    (keeper,) = (callback for callback in trainer.callbacks if isinstance(callback, SaveCheckpoints))  # type: ignore[attr-defined]
    assert keeper.best_model_path == str(tmp_path / f"checkpoints/step-{best}.ckpt")


def test_save_checkpoints_saves_by_time_too(tmp_path: Path) -> None:
    class Waits(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.callbacks[0]._saved_at -= 120  # type: ignore[attr-defined]

    fit(tmp_path, Waits(), save={"every_n_steps": None, "minutes": 1.5, "keep": 9}, limit_val_batches=0)
    assert saved_steps(tmp_path) == [6, 10]


def test_a_best_checkpoint_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    scores, save = Score(1, 2, 3, 4), {"monitor": "score", "keep": 1}
    fit(tmp_path, scores, save=save, max_steps=8)
    (tmp_path / "checkpoints/step-4.ckpt").rename(tmp_path / "elsewhere.ckpt")
    fit(tmp_path, scores, save=save, max_steps=16)
    assert os.readlink(tmp_path / "checkpoints/best.ckpt") == "step-8.ckpt"


def test_save_checkpoints_names_an_unknown_metric_at_the_first_validation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SaveCheckpoints.monitor=val/los is not logged; set it to one of .*val/loss"):
        fit(tmp_path, save={"monitor": "val/los"})
