"""metrics.csv over several parts of a run, and over what goes wrong."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from nlgmoe.run.folder import RunCSVLogger, with_run_csv


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
