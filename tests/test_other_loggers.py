"""Weights & Biases (offline) and MLflow get the metrics of `metrics.csv`, and the files of the run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import wandb
from mlflow.tracking import MlflowClient

from nlgmoe.commands.main import main
from tests.end_to_end.test_train_cli import quickstart

LOGGERS = """
trainer:
  logger:
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {project: experts, offline: true}
    - class_path: lightning.pytorch.loggers.MLFlowLogger
      init_args: {experiment_name: experts, tracking_uri: "sqlite:///mlflow.db"}
"""


def test_metrics_and_files(pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts: list[wandb.Artifact] = []
    log_artifact = wandb.Run.log_artifact
    spy = lambda run, artifact: artifacts.append(artifact) or log_artifact(run, artifact)  # noqa: E731
    monkeypatch.setattr(wandb.Run, "log_artifact", spy)
    monkeypatch.chdir(tmp_path)
    Path("loggers.yaml").write_text(LOGGERS)
    run = quickstart(tmp_path / "run", f"--data.data_dir={pocket_pile}", "--model.train_tokens=512")
    main(["fit", *run, "--config=loggers.yaml"])
    expected = pd.read_csv("run/metrics.csv").set_index("step")["val/loss"].dropna()

    client = MlflowClient("sqlite:///mlflow.db")
    (logged,) = client.search_runs([client.get_experiment_by_name("experts").experiment_id])
    history = client.get_metric_history(logged.info.run_id, "val/loss")
    assert {one.step: one.value for one in history} == pytest.approx(dict(expected))
    files = {one.path for one in client.list_artifacts(logged.info.run_id)}
    assert files == {"config.yaml", "versions.json", "summary.json", "report.html"}

    assert wandb.run and wandb.run.summary["val/loss"] == pytest.approx(expected.iloc[-1])
    (artifact,) = artifacts
    assert set(artifact.manifest.entries) == files and any(Path("wandb").glob("offline-run-*/*.wandb"))
    wandb.finish()
