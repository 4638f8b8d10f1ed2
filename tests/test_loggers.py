"""metrics.csv over several parts of a run, and over what goes wrong; Weights & Biases (offline) and MLflow beside it."""

import json
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch.loggers import CSVLogger

from nlgmoe.run.folder import RunCSVLogger, with_run_csv
from tests.support.commands import quickstart
from tests.support.processes import python


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


LOGGERS = """
trainer:
  logger:
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {project: experts, offline: true}
    - class_path: lightning.pytorch.loggers.MLFlowLogger
      init_args: {experiment_name: experts, tracking_uri: "sqlite:///mlflow.db"}
"""
# In a process of its own: once imported, wandb sets context variables whenever something is written, also by a progress bar that
# is collected as garbage within another variable's `set`. That breaks the context for good (python/cpython#148891).
TRAINS = """
import json, sys, wandb
from nlgmoe.commands.main import main

artifacts, log_artifact = [], wandb.Run.log_artifact
wandb.Run.log_artifact = lambda run, artifact: artifacts.append(artifact) or log_artifact(run, artifact)
main(["fit", *sys.argv[1:], "--config=loggers.yaml"])
(artifact,) = artifacts
with open("logged.json", "w") as file:
    json.dump({"files": list(artifact.manifest.entries), "val/loss": wandb.run.summary["val/loss"]}, file)
wandb.finish()
"""


def test_other_loggers_get_the_metrics_and_files(pocket_pile: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    (tmp_path / "loggers.yaml").write_text(LOGGERS)
    run = quickstart(tmp_path / "run", f"--data.data_dir={pocket_pile}", "--model.train_tokens=512")
    (tmp_path / "trains.py").write_text(TRAINS)
    done = python("trains.py", *run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = pd.read_csv(tmp_path / "run/metrics.csv").set_index("step")["val/loss"].dropna()

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (logged,) = client.search_runs([client.get_experiment_by_name("experts").experiment_id])
    history = client.get_metric_history(logged.info.run_id, "val/loss")
    assert {one.step: one.value for one in history} == pytest.approx(dict(expected))
    files = {one.path for one in client.list_artifacts(logged.info.run_id)}
    assert files == {"config.yaml", "versions.json", "summary.json", "report.html"}

    wandb = json.loads((tmp_path / "logged.json").read_text())
    assert wandb["val/loss"] == pytest.approx(expected.iloc[-1])
    assert set(wandb["files"]) == files and any(tmp_path.glob("wandb/offline-run-*/*.wandb"))
