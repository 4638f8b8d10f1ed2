"""What a run records of its starts, and where its checkpoints go, whatever loggers and callbacks a configuration names."""

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
from nlgmoe.run.save_checkpoints import SaveCheckpoints
from nlgmoe.validation import SettingError
from tests.support.commands import TINY

ROOT = Path(__file__).parents[2]


def test_checkpoints_stay_where_they_are_with_other_loggers_and_callbacks(pocket_pile: Path, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    command = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *TINY, f"--data.data_dir={pocket_pile}"]
    command += [f"--trainer.default_root_dir={run}", "--trainer.logger=CSVLogger"]
    command += [f"--trainer.logger.save_dir={elsewhere}", "--trainer.callbacks=nlgmoe.WriteReport"]
    main([*command, "--model.train_tokens=256"])
    assert (run / "checkpoints/last.ckpt").exists() and elsewhere.exists() and not list(elsewhere.rglob("*.ckpt"))
    logged = len((run / "metrics.csv").read_text().splitlines())
    main([*command, "--model.train_tokens=512", "--ckpt_path=auto"])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (8, 512)
    starts = {step: yaml.safe_load(file.read_text())["model"]["train_tokens"] for step, file in starts_of(run)}
    assert starts == {0: 256, 4: 512}
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["train_tokens"] == 512
    assert len((run / "metrics.csv").read_text().splitlines()) == 2 * (logged - 1) + 1
    flat = yaml.safe_load((run / "hparams.yaml").read_text())  # what every logger gets
    assert flat["config"] == str(ROOT / "configs/quickstart.yaml")
    assert (flat["model.train_tokens"], flat["model.config.moe.top_k"], flat["data.seed"]) == (512, 1, 1234)


def test_the_home_folder_is_that_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here.yaml").write_text("data: {data_dir: ~/pile}\ntrainer: {default_root_dir: '~/run'}")
    files = [ROOT / "configs/quickstart.yaml", tmp_path / "here.yaml"]
    found = parse_config(files, model__warm_start__checkpoint="~/a.ckpt")
    assert found["data"]["data_dir"] == f"{tmp_path}/pile"
    assert found["trainer"]["default_root_dir"] == f"{tmp_path}/run"
    assert found["model"]["warm_start"]["checkpoint"] == f"{tmp_path}/a.ckpt"
    nlgmoe_command.main(["configs", "copy", "--output=~/mine", "quickstart.yaml"])
    assert (tmp_path / "mine/quickstart.yaml").is_file()


class OwnLoad(ExpertLoad):
    """A user's variant of a default callback."""


def test_callback_that_varies_a_default_one_takes_its_place() -> None:
    message = r"^trainer\.callbacks=\[<.*OwnLoad object.*>\]: write an object as in a file"
    with pytest.raises(SettingError, match=message):
        load_config(ROOT / "configs/dense/laptop.yaml", trainer__callbacks=[OwnLoad()])
    names = (f"{__name__}.OwnLoad", "lightning.pytorch.callbacks.TQDMProgressBar")
    own = [{"class_path": name} for name in names]
    made = load_config(ROOT / "configs/dense/laptop.yaml", trainer__callbacks=own).trainer.callbacks
    found = [type(one).__name__ for one in made if isinstance(one, ExpertLoad | TQDMProgressBar)]
    assert sorted(found) == ["OwnLoad", "TQDMProgressBar"]


def test_callbacks_with_a_plus_sign_are_added_and_without_replace_the_others(tmp_path: Path) -> None:
    laptop, more = ROOT / "configs/dense/laptop.yaml", tmp_path / "more.yaml"

    def callbacks(*files: Path) -> list[Any]:
        return load_config([*files], trainer__default_root_dir=str(tmp_path / "run")).trainer.callbacks

    more.write_text("trainer:\n  callbacks+:\n    - class_path: nlgmoe.WriteReport\n")
    names, added = (sorted(type(one).__name__ for one in callbacks(laptop, *rest)) for rest in ([], [more]))
    assert added == sorted([*names, "WriteReport"])
    keeper = "trainer:\n  callbacks{}:\n  - class_path: nlgmoe.callbacks.SaveCheckpoints\n    init_args: {{{}}}\n"
    for plus, keep in (("+", 2), ("", 2)):  # the second is the default, not the first file's
        more.write_text(keeper.format("", "keep: 9, every_n_steps: 7"))
        (last := tmp_path / "last.yaml").write_text(keeper.format(plus, "every_n_steps: 20"))
        found = [one for one in callbacks(laptop, more, last) if isinstance(one, SaveCheckpoints)]
        assert [(one.every_n_steps, one.keep) for one in found] == [(20, keep)]


def test_trial_of_a_few_batches_writes_nothing(
    pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither into a new folder, nor into one with a run; and no run opens a connection."""
    connect, reached = socket.socket.connect, list[Any]()

    def noted(it: socket.socket, address: Any) -> None:
        if it.family != socket.AF_UNIX:
            reached.append(address)
        connect(it, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    command = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *TINY, f"--data.data_dir={pocket_pile}"]
    command += ["--trainer.callbacks.init_args.max_new_tokens=4"]  # of the samples
    new, run = tmp_path / "new", tmp_path / "run"
    tried = ["--trainer.fast_dev_run=2", "--model.train_tokens=512"]
    main([*command, *tried, f"--trainer.default_root_dir={new}"])
    assert not new.exists()
    main([*command, "--model.train_tokens=64", f"--trainer.default_root_dir={run}"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main([*command, *tried, f"--trainer.default_root_dir={run}", "--ckpt_path=last"])
    assert not reached
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_settings_that_load_config_cannot_obey_are_named() -> None:
    for settings, words in (
        ({"ckpt_path": "last"}, "resumes nothing: give ckpt_path=last to"),
        ({"seed_everything": 0}, r"seed_everything=0 changes nothing .* set those"),
    ):
        with pytest.warns(UserWarning, match=words):
            load_config(ROOT / "configs/quickstart.yaml", **settings)
