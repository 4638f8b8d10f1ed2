"""The end of a run is kept, whatever its ModelCheckpoints think of it."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from nlgmoe.callbacks import SaveAtEnd
from nlgmoe.checkpoint.folder import read_document
from tests.checkpoint.runs import fit


def steps(folder: Path) -> dict[str, int]:
    return {path.name: read_document(path)["global_step"] for path in folder.glob("*.ckpt")}


@pytest.mark.parametrize(
    ("keeper", "found"),
    [
        ({"every_n_train_steps": 3, "save_last": True}, {"step=6.ckpt": 6, "last.ckpt": 8}),
        ({"every_n_train_steps": 3, "save_last": "link"}, {"step=6.ckpt": 6, "last.ckpt": 8}),
        ({"every_n_train_steps": 3}, {"step=6.ckpt": 6, "last.ckpt": 8}),
        ({"every_n_train_steps": 4, "save_last": True}, {"step=8.ckpt": 8, "last.ckpt": 8}),
        ({"every_n_train_steps": 4}, {"step=8.ckpt": 8}),  # the end is there under its own name
        ({"every_n_train_steps": 4, "save_weights_only": True}, {"step=8.ckpt": 8, "last.ckpt": 8}),
        ({"monitor": "val/loss", "mode": "max", "save_last": True}, {"step=4.ckpt": 4, "last.ckpt": 8}),
    ],
    ids=str,
)
def test_the_last_step_is_saved_once(keeper: dict, found: dict[str, int], tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path / "all", "{step}", **keeper), SaveAtEnd())
    assert steps(tmp_path / "all") == found


def test_a_last_checkpoint_that_has_fallen_behind_is_replaced(tmp_path: Path) -> None:
    keeper = {"every_n_train_steps": 4}
    fit(tmp_path, ModelCheckpoint(tmp_path, "{step}", **keeper), SaveAtEnd(), steps=2)
    assert steps(tmp_path) == {"last.ckpt": 2}
    fit(tmp_path, ModelCheckpoint(tmp_path, "{step}", **keeper), SaveAtEnd(), steps=8, resume=tmp_path)
    assert steps(tmp_path) == {"last.ckpt": 8, "step=8.ckpt": 8}


def test_nothing_is_saved_where_checkpoints_are_turned_off(tmp_path: Path) -> None:
    fit(tmp_path, SaveAtEnd(), steps=2)
    assert steps(tmp_path) == {}


def test_nothing_is_saved_where_a_few_batches_are_tried(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, "{step}"), SaveAtEnd(), fast_dev_run=4)
    assert steps(tmp_path) == {}
