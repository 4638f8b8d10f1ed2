"""Weights & Biases (offline) and MLflow get the metrics of `metrics.csv`, and the files of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch.loggers import Logger
from mlflow.tracking import MlflowClient

from nlgmoe.commands.main import main
from tests.end_to_end.test_train_cli import quickstart
from tests.processes import python

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


def test_metrics_and_files(pocket_pile: Path, tmp_path: Path) -> None:
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


class Refusing(Logger):
    """Fails as a package of its own does: not in nlgmoe or Lightning."""

    name = version = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        json.loads("the server's answer")

    def log_hyperparams(self, *args: object, **kwargs: object) -> None: ...


@pytest.mark.parametrize(
    ("logger", "code", "words"),
    [
        (["lightning.pytorch.loggers.MLFlowLogger"], 2, ["MLFlowLogger fails: The filesystem tracking", "sqlite:///"]),
        (["lightning.pytorch.loggers.MLFlowLogger", "tracking_uri=no://x"], 2, ["MLFlowLogger fails: ", "'no://x'"]),
        (
            ["lightning.pytorch.loggers.MLFlowLogger", "tracking_uri=http://user:secret@127.0.0.1:9"],
            2,
            ["MLFlowLogger connects to 127.0.0.1:9; it tries for minutes", "MLFlowLogger fails: "],
        ),
        (["lightning.pytorch.loggers.MLFlowLogger", "tracking_uri=http://h:port"], 2, ["MLFlowLogger fails: "]),
        (
            ["lightning.pytorch.loggers.TensorBoardLogger", "save_dir=x", "dict_kwargs.foo=1"],
            2,
            ["TensorBoardLogger fails: SummaryWriter.__init__() got an unexpected keyword argument 'foo'"],
        ),
        (["tests.test_other_loggers.Refusing"], 1, ["Refusing fails: Expecting value"]),
    ],
    ids=["a file store", "no such store", "no server", "no port", "another argument", "while training"],
)
def test_a_logger_that_fails_is_named(
    logger: list[str],
    code: int,
    words: list[str],
    pocket_pile: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    flags = [f"--trainer.logger={logger[0]}", *(f"--trainer.logger.{one}" for one in logger[1:])]
    with pytest.raises(SystemExit) as end:
        main(["fit", *quickstart(tmp_path / "run", f"--data.data_dir={pocket_pile}"), *flags])
    said = caplog.text + capfd.readouterr().err
    assert end.value.code == code and all(one in said for one in words) and "error: unexpected" not in said
