"""metrics.csv over several parts of a run, and over what goes wrong."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger

from nlgmoe import MoEGPTModule
from nlgmoe.run.folder import RunCSVLogger, RunFolder, with_run_csv
from tests.support.trainers import CONFIG


def log(folder: Path, *rows: dict[str, float]) -> str:
    logger = RunCSVLogger(folder)
    for step, row in enumerate(rows):
        logger.log_metrics(row, step)
        logger.save()
    return (folder / "metrics.csv").read_text()


def test_table_logger_adds_a_new_column_to_earlier_rows(tmp_path: Path) -> None:
    log(tmp_path, {"loss": 2.0}, {"loss": 1.0})
    assert log(tmp_path, {"norm": 1.0}).split() == ["loss,norm,step", "2.0,,0", "1.0,,1", ",1.0,0"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_table_logger_drops_a_row_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("loss,step\r\n2.0,0\r\n1.")
    assert log(tmp_path, {"loss": 0.5}).split() == ["loss,step", "2.0,0", "0.5,0"]


class Refusing(RunCSVLogger):
    def log_hyperparams(self, *_: Any) -> None:
        raise RuntimeError("Changing param values is not allowed")


def test_a_logger_that_refuses_settings_ends_no_run(tmp_path: Path) -> None:
    """As MLflow's does in a resumed run whose settings have changed."""
    parser = ArgumentParser()
    parser.add_argument("--rate", type=float)
    trainer: Any = SimpleNamespace(default_root_dir=tmp_path, global_step=4, loggers=[Refusing(tmp_path)])
    with pytest.warns(UserWarning, match="Refusing did not take all settings: Changing param values"):
        RunFolder(parser, parser.parse_args(["--rate=0.1"])).save_config(trainer, MoEGPTModule(CONFIG), "fit")
    assert "rate: 0.1" in (tmp_path / "config.yaml").read_text()


def test_rows_of_a_run_folder_survive_a_logger_that_would_delete_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that names the folder in another way; evaluation writes no rows between those of training."""
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for same in (tmp_path, tmp_path / "link", "."):
        (one,) = with_run_csv(CSVLogger(same, name="", version=""), tmp_path, True)
        assert isinstance(one, RunCSVLogger)
        assert with_run_csv([CSVLogger(same, name="", version=""), RunCSVLogger(same)], tmp_path, False) == []
