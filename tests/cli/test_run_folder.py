"""What a run records of its starts, and where its checkpoints go, whatever loggers and callbacks a configuration names."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar

from nlgmoe import load_config
from nlgmoe.callbacks import ExpertLoad
from nlgmoe.cli.train import main
from nlgmoe.commands import main as nlgmoe_command
from nlgmoe.experiment import parse_config
from nlgmoe.run.folder import starts_of
from nlgmoe.run.keeper import SaveCheckpoints
from tests.end_to_end.test_train_cli import TINY

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(pocket_pile: Path, tmp_path: Path) -> list[str]:
    """`fit` of a tiny quickstart, whose `extra.yaml` names another logger, and other callbacks."""
    (tmp_path / "extra.yaml").write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "logger": {
                        "class_path": "lightning.pytorch.loggers.CSVLogger",
                        "init_args": {"save_dir": str(tmp_path / "elsewhere")},
                    },
                    "callbacks": [{"class_path": "nlgmoe.WriteReport"}],
                }
            }
        )
    )
    config = ["--config", str(ROOT / "configs/quickstart.yaml"), "--config", str(tmp_path / "extra.yaml")]
    run = [f"--trainer.default_root_dir={tmp_path / 'run'}", f"--data.data_dir={pocket_pile}"]
    return ["fit", *config, *TINY, *run]


def test_another_logger_and_other_callbacks_leave_the_checkpoints_where_they_are(
    command: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main([*command, "--model.train_tokens=256"])
    assert (run / "checkpoints" / "last.ckpt").exists() and not list((tmp_path / "elsewhere").rglob("*.ckpt"))

    logged = len((run / "metrics.csv").read_text().splitlines())
    main([*command, "--model.train_tokens=512", "--ckpt_path=auto"])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (8, 512)
    starts = {step: yaml.safe_load(file.read_text())["model"]["train_tokens"] for step, file in starts_of(run)}
    assert starts == {0: 256, 4: 512}
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["train_tokens"] == 512
    assert len((run / "metrics.csv").read_text().splitlines()) == 2 * (logged - 1) + 1
    flat = yaml.safe_load((run / "hparams.yaml").read_text())  # what every logger gets
    assert (flat["model.train_tokens"], flat["model.config.moe.top_k"], flat["data.seed"]) == (512, 1, 1234)


def test_names_in_the_value_of_an_argument_are_its_own(tmp_path: Path) -> None:
    files = {"train": "a.jsonl", "validation": "b.jsonl", "validation.wiki": "c.jsonl"}
    streamed = {"class_path": "nlgmoe.data.StreamedText", "init_args": {"path": "x", "data_files": files}}
    (tmp_path / "streamed.yaml").write_text(yaml.safe_dump({"data": {"corpus": streamed}}))
    parsed = parse_config(ROOT / "configs/quickstart.yaml", tmp_path / "streamed.yaml")
    assert parsed["data"]["corpus"]["init_args"]["data_files"] == files


def test_a_setting_of_lightning_that_no_draw_depends_on_is_told() -> None:
    with pytest.warns(UserWarning, match=r"seed_everything=0 changes nothing .* set those"):
        load_config(ROOT / "configs/quickstart.yaml", seed_everything=0)


def test_the_home_folder_is_that_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here.yaml").write_text("data: {data_dir: ~/pile}\ntrainer: {default_root_dir: '~/run'}")
    found = parse_config(
        [ROOT / "configs/quickstart.yaml", tmp_path / "here.yaml"], model__warm_start__checkpoint="~/a.ckpt"
    )
    assert found["data"]["data_dir"] == f"{tmp_path}/pile"
    assert found["trainer"]["default_root_dir"] == f"{tmp_path}/run"
    assert found["model"]["warm_start"]["checkpoint"] == f"{tmp_path}/a.ckpt"
    nlgmoe_command.main(["configs", "copy", "quickstart.yaml", "--output=~/mine"])
    assert (tmp_path / "mine/quickstart.yaml").is_file()


def test_load_config_tells_that_it_resumes_nothing() -> None:
    with pytest.warns(UserWarning, match="resumes nothing: give ckpt_path=last to"):
        load_config(ROOT / "configs/quickstart.yaml", ckpt_path="last")


class OwnLoad(ExpertLoad):
    """A user's variant of a default callback."""


def test_a_variant_of_a_default_callback_takes_its_place(tmp_path: Path) -> None:
    names = ("tests.cli.test_run_folder.OwnLoad", "lightning.pytorch.callbacks.TQDMProgressBar")
    (tmp_path / "more.yaml").write_text(
        f"trainer: {{callbacks: [{', '.join(f'{{class_path: {one}}}' for one in names)}]}}"
    )
    made = load_config([ROOT / "configs/dense/laptop.yaml", tmp_path / "more.yaml"]).trainer.callbacks
    found = [type(one).__name__ for one in made if isinstance(one, ExpertLoad | TQDMProgressBar)]
    assert sorted(found) == ["OwnLoad", "TQDMProgressBar"]


@pytest.mark.parametrize("text", ["08", "1:30", "no"])
def test_text_that_could_be_something_else_is_recorded_as_text(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": text, "name": text}}
    settings = {"trainer": {"logger": [logger], "default_root_dir": text}}
    given, recorded = tmp_path / "given.yaml", tmp_path / "recorded.yaml"
    given.write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--config", str(given), "--print_config"])
    recorded.write_text(capsys.readouterr().out)
    for found in (parse_config(recorded)["trainer"], yaml.safe_load(recorded.read_text())["trainer"]):
        assert found["default_root_dir"] == text
        (made,) = (one["init_args"] for one in found["logger"])
        assert (made["save_dir"], made["name"]) == (text, text)


def test_a_list_with_a_plus_sign_adds_callbacks(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: nlgmoe.WriteReport\n")
    (tmp_path / "wrong.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: nlgmoe.WriteReprt\n")
    quickstart = ROOT / "configs/dense/laptop.yaml"
    here = {"trainer__default_root_dir": str(tmp_path / "run")}
    plain, more = (
        load_config(files, **here).trainer.callbacks for files in (quickstart, [quickstart, tmp_path / "more.yaml"])
    )
    added = sorted(type(one).__name__ for one in more)
    for one in plain:
        added.remove(type(one).__name__)
    assert added == ["WriteReport"]
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  callbacks+:\n  - class_path: nlgmoe.callbacks.SaveCheckpoints\n    init_args: {every_n_steps: 20}\n"
    )
    again = load_config([quickstart, tmp_path / "more.yaml"], **here).trainer.callbacks
    assert [one.every_n_steps for one in again if isinstance(one, SaveCheckpoints)] == [20]
    with pytest.raises(ValueError, match=r"wrong.yaml, line 3\).*did you mean WriteReport"):
        load_config([quickstart, tmp_path / "wrong.yaml"], **here)


def test_a_list_given_again_keeps_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    sample = "trainer:\n  callbacks:\n  - class_path: nlgmoe.callbacks.SampleText\n    init_args: {{prompts: [a]{}}}\n"
    for name, more in {"first": ", top_k: 3", "second": ""}.items():
        (tmp_path / f"{name}.yaml").write_text(sample.format(more))
    parsed = parse_config(
        ROOT / "configs/quickstart.yaml", *(tmp_path / f"{name}.yaml" for name in ("first", "second"))
    )
    assert [one["init_args"]["top_k"] for one in parsed["trainer"]["callbacks"]] == [40]  # the default


def test_nothing_is_written_where_a_few_batches_are_tried(
    pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither into a new folder, nor into one with a run; and no run opens a connection."""
    connect = socket.socket.connect

    def local(it: socket.socket, address: Any) -> None:
        assert it.family == socket.AF_UNIX, address
        connect(it, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    command = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *TINY, f"--data.data_dir={pocket_pile}"]
    command += ["--trainer.callbacks.init_args.max_new_tokens=4"]  # of the samples
    new, run = tmp_path / "new", tmp_path / "run"
    tried = ["--trainer.fast_dev_run=2", "--model.train_tokens=512"]
    main([*command, *tried, f"--trainer.default_root_dir={new}"])
    assert not new.exists()
    main([*command, "--model.train_tokens=64", f"--trainer.default_root_dir={run}"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main([*command, *tried, f"--trainer.default_root_dir={run}", "--ckpt_path=last"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
