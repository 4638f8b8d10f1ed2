"""What a run records of its starts, and where its checkpoints go, whatever loggers and callbacks a configuration names."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

from nlgmoe import load_config
from nlgmoe.callbacks import ExpertLoad
from nlgmoe.checkpoint.folder import read_document
from nlgmoe.checkpoint.newest import RESUMING
from nlgmoe.cli.ckpt_path import resolve_checkpoint
from nlgmoe.cli.first_save import step_past_first_save
from nlgmoe.cli.ownership import refuse_second_run
from nlgmoe.cli.parser import _with_home
from nlgmoe.cli.train import main
from nlgmoe.commands import main as nlgmoe_command
from nlgmoe.experiment import parse_config
from nlgmoe.module import MoEGPTModule
from nlgmoe.tools.report.runs import read_runs
from nlgmoe.tools.report.tables import other_tokens
from tests.checkpoint.runs import rewrite_json
from tests.end_to_end.test_train_cli import TINY

ROOT = Path(__file__).parents[2]


class Kill(Callback):
    """Ends a run before its fourth step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            raise ValueError("killed")


@pytest.fixture
def command(pocket_pile: Path, tmp_path: Path) -> list[str]:
    """`fit` of a tiny quickstart, whose `extra.yaml` names another logger, and callbacks without `ModelCheckpoint`."""
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
    assert any(
        "takes the place of the earlier one, without ModelCheckpoint" in str(warning.message)
        and "SampleText" in str(warning.message)
        and "WriteReport (" not in str(warning.message)
        for warning in recwarn
    )
    assert (run / "checkpoints" / "last.ckpt").exists() and not list((tmp_path / "elsewhere").rglob("*.ckpt"))

    logged = len((run / "metrics.csv").read_text().splitlines())
    main([*command, "--model.train_tokens=512", "--ckpt_path=auto"])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (8, 512)
    starts = json.loads((run / "starts.json").read_text())
    assert [start["step"] for start in starts] == [0, 4]
    assert [start["rows"] for start in starts] == [0, logged - 1]
    tokens = [yaml.safe_load((run / start["config"]).read_text())["model"]["train_tokens"] for start in starts]
    assert tokens == [256, 512]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["train_tokens"] == 512

    (run / "checkpoints").rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        main([*command, "--model.train_tokens=768", "--ckpt_path=auto"])
    assert (
        "from which the run went on at step 4, is gone; bring it back, or give another path" in capsys.readouterr().err
    )


def test_one_batch_is_not_all_of_them_whatever_was_imported_before() -> None:
    """`typing` keeps one of two optional unions that differ in their order; Lightning's own `Fabric` has the other one."""
    program = """if True:
        import sys, typing

        class OtherOrder:
            def find_spec(self, name, *_):
                if name == "lightning.pytorch.trainer.trainer":
                    for clear in typing._cleanups:
                        clear()
                    typing.Optional[typing.Union[float, int]]

        sys.meta_path.insert(0, OtherOrder())
        from nlgmoe import load_config
        trainer = load_config("configs/quickstart.yaml", trainer__limit_val_batches=1).trainer
        print(repr(trainer.limit_val_batches))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["1"], done.stderr


def test_one_callback_in_place_of_a_list_is_told(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("trainer:\n  callbacks: {class_path: nlgmoe.WriteReport}")
    with pytest.warns(UserWarning, match=r"takes the place of the earlier one, without ModelCheckpoint \("):
        load_config([ROOT / "configs/quickstart.yaml", tmp_path / "one.yaml"])


@pytest.mark.parametrize("on_the_command_line", [False, True])
def test_a_list_that_is_given_again_keeps_nothing_of_the_earlier_one(on_the_command_line: bool, tmp_path: Path) -> None:
    def blend(*parts: str) -> str:
        return f"{{class_path: nlgmoe.data.Blend, init_args: {{parts: [{', '.join(parts)}]}}}}"

    def part(name: str, arguments: str = "") -> str:
        corpus = f"{{class_path: nlgmoe.data.PocketPile{arguments}}}"
        return f"{{name: {name}, weight: 1.0, corpus: {corpus}}}"

    again = blend(part("c"), part("d"))
    (tmp_path / "first.yaml").write_text(
        f"data: {{corpus: {blend(part('a'), part('b', ', init_args: {domains: [prose]}'))}}}"
    )
    (tmp_path / "again.yaml").write_text(f"data: {{corpus: {again}}}")
    files = [
        "configs/quickstart.yaml",
        tmp_path / "first.yaml",
        *([] if on_the_command_line else [tmp_path / "again.yaml"]),
    ]
    parts = (
        {"data__corpus__init_args__parts": yaml.safe_load(again)["init_args"]["parts"]} if on_the_command_line else {}
    )
    corpus = parse_config([ROOT / file for file in files], **parts)["data"]["corpus"]
    assert [(each["name"], each["corpus"]["init_args"]["domains"]) for each in corpus["init_args"]["parts"]] == [
        ("c", None),
        ("d", None),
    ]


def test_names_in_the_value_of_an_argument_are_its_own(tmp_path: Path) -> None:
    files = {"train": "a.jsonl", "validation": "b.jsonl", "validation.wiki": "c.jsonl"}
    streamed = {"class_path": "nlgmoe.data.StreamedText", "init_args": {"path": "x", "data_files": files}}
    (tmp_path / "streamed.yaml").write_text(yaml.safe_dump({"data": {"corpus": streamed}}))
    parsed = parse_config([ROOT / "configs/quickstart.yaml", tmp_path / "streamed.yaml"])
    assert parsed["data"]["corpus"]["init_args"]["data_files"] == files


def test_a_setting_of_lightning_that_no_draw_depends_on_is_told() -> None:
    with pytest.warns(UserWarning, match=r"seed_everything=0 changes nothing .* set those"):
        load_config(ROOT / "configs/quickstart.yaml", seed_everything=0)


@pytest.mark.parametrize(
    ("keepers", "starts"),
    [
        ([{"every_n_train_steps": 20}], True),
        ([{"every_n_train_steps": 18}], False),
        ([{"train_time_interval": timedelta(seconds=50)}], True),
        ([{"train_time_interval": timedelta(seconds=50)}, {"every_n_train_steps": 18}], False),
        ([{"train_time_interval": timedelta(seconds=20)}], False),
        ([{"monitor": "val/loss"}], False),
        ([{"monitor": "val/loss", "every_n_epochs": 2}], True),
        ([{"save_on_train_epoch_end": True}], True),
        ([], False),
    ],
    ids=str,
)
def test_auto_starts_a_run_again_that_was_killed_before_its_first_checkpoint(
    keepers: list[dict[str, Any]], starts: bool, tmp_path: Path
) -> None:
    rows = "step,train/loss,time/elapsed,val/loss\n9,4.0,30,\n9,,,4.0\n19,3.0,60,\n"
    (tmp_path / "metrics.csv").write_text(rows)
    made = [ModelCheckpoint(tmp_path, **one) for one in keepers]
    if starts:
        assert resolve_checkpoint("auto", tmp_path, "", True, keepers=made) is None
        (tmp_path / "summary.json").touch()
    with pytest.raises(ValueError, match="has logged 19 steps but holds no checkpoint"):
        resolve_checkpoint("auto", tmp_path, "", True, keepers=made)


def test_checkpoints_of_another_run_are_not_replaced(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, place = tmp_path / "run", tmp_path / "scratch"
    (place / "step-4.ckpt").mkdir(parents=True)
    keeper = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={place}"]
    with pytest.raises(SystemExit):
        main([*command, *keeper])
    assert f"ModelCheckpoint.dirpath={place} holds checkpoints of another run" in capsys.readouterr().err
    run.mkdir()
    (run / "config.yaml").touch()  # a run that saves there is continued
    refuse_second_run(run, place / "step-4.ckpt", [place])
    with pytest.raises(ValueError, match="is not of it"):
        refuse_second_run(run, place / "step-4.ckpt")


def test_a_checkpoint_of_another_run_in_a_folder_of_its_own_is_not_resumed_here(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its path does not say whose it is, and the folder's metrics would be those of two runs."""
    place = tmp_path / "scratch"
    keeper = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={place}"]
    keeper += ["--trainer.callbacks.save_last=true"]
    other = tmp_path / "other"
    main([*command, *keeper, "--model.train_tokens=128"])
    main([*command, "--model.train_tokens=128", f"--trainer.default_root_dir={other}"])
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    more = ["--model.train_tokens=256", f"--ckpt_path={place / 'last.ckpt'}"]
    with pytest.raises(SystemExit):
        main([*command, *keeper, *more, f"--trainer.default_root_dir={other}"])
    assert f"ModelCheckpoint.dirpath={place} holds checkpoints of another run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    main([*command, *keeper, *more])
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    main([*command, *keeper, *more, "--model.train_tokens=384", f"--trainer.default_root_dir={moved}"])
    starts = json.loads((moved / "starts.json").read_text())
    assert [start["step"] for start in starts] == [0, 2, 4] and len({start["run"] for start in starts}) == 1

    fork = [*command, "--model.train_tokens=512", f"--trainer.default_root_dir={tmp_path / 'fork'}"]
    with pytest.raises(SystemExit):  # it would replace those of the run that it goes on from
        main([*fork, *keeper, f"--ckpt_path={place / 'last.ckpt'}"])
    assert f"ModelCheckpoint.dirpath={place} holds checkpoints of another run" in capsys.readouterr().err
    main([*fork, f"--ckpt_path={place / 'last.ckpt'}"])
    (started,) = json.loads((tmp_path / "fork/starts.json").read_text())
    assert started["run"] != starts[0]["run"]
    shutil.rmtree(tmp_path / "fork/checkpoints")  # as if it had been killed before its first save
    main([*fork, "--ckpt_path=last"])
    assert len(json.loads((tmp_path / "fork/starts.json").read_text())) == 2
    main([*fork, "--ckpt_path=last", "--model.train_tokens=640"])
    with pytest.raises(SystemExit):
        there = tmp_path / "fork/checkpoints"
        taken = [f"--ckpt_path={there / 'last.ckpt'}", f"--trainer.callbacks.dirpath={there}"]
        main([*command, keeper[0], *taken, f"--trainer.default_root_dir={moved}", "--model.train_tokens=768"])
    assert f"ModelCheckpoint.dirpath={there} holds checkpoints of another run" in capsys.readouterr().err


def test_what_a_fork_saves_when_it_begins_is_its_own(command: list[str], tmp_path: Path) -> None:
    """A validation that the other run still had to do; the fork is killed before its next save, and goes on."""
    options = {"auto_insert_metric_name": "false", "enable_version_counter": "false"}
    keepers = []
    for one in (
        {"filename": "step-{step}", "every_n_train_steps": 2, "save_last": "true"},
        {"filename": "best-{step}", "monitor": "val/loss"},
    ):
        keepers += ["--trainer.callbacks+=ModelCheckpoint"]
        keepers += [f"--trainer.callbacks.{name}={value}" for name, value in (one | options).items()]
    train = [*command, *keepers, "--trainer.val_check_interval=2", "--model.train_tokens=256"]
    kill = ["--trainer.callbacks+=tests.cli.test_run_folder.Kill"]
    fork = [f"--trainer.default_root_dir={tmp_path / 'fork'}"]
    for more in ([], [*fork, f"--ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}"]):
        with pytest.raises(SystemExit):
            main([*train, *kill, *more])
    runs = [read_document(tmp_path / name / "checkpoints/best-2.ckpt") for name in ("run", "fork")]
    assert runs[0]["run"] != runs[1]["run"] and runs[1]["start"] is None
    main([*train, *fork, "--ckpt_path=last"])


def killed(*_: Any) -> None:
    raise SystemExit(9)


@pytest.mark.parametrize(
    ("hook", "source"),
    [
        ("on_load_checkpoint", "run/checkpoints/last.ckpt"),
        ("on_train_start", "run/checkpoints/last.ckpt"),
        ("on_train_start", "run"),
        ("configure_model", "run"),  # before the checkpoint is chosen
    ],
)
def test_a_fork_that_is_killed_before_its_first_step_goes_on_as_one(
    hook: str, source: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main([*command, "--model.train_tokens=256"])
    folder = tmp_path / "fork"
    fork = [*command, "--model.train_tokens=512", f"--trainer.default_root_dir={folder}"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(MoEGPTModule, hook, killed)
        main([*fork, f"--ckpt_path={tmp_path / source}"])
    noted = (folder / RESUMING).read_text()
    refused = tmp_path / "refused.ckpt"
    shutil.copytree(tmp_path / "run/checkpoints/last.ckpt", refused)
    with pytest.raises(SystemExit):  # a start that is refused is none
        main([*fork, f"--ckpt_path={refused}", "--model.seed=99"])
    assert (folder / RESUMING).read_text() == noted
    main([*fork, "--ckpt_path=auto"])
    (start,) = json.loads((folder / "starts.json").read_text())
    assert start["step"] == 4 and not (folder / RESUMING).exists()
    main([*fork, "--ckpt_path=last"])  # at its end
    assert not (folder / RESUMING).exists()


def test_a_fork_whose_source_was_saved_again_at_the_same_step_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--model.train_tokens=256"])
    source = tmp_path / "run/checkpoints/last.ckpt"
    fork = [*command, "--model.train_tokens=512", f"--trainer.default_root_dir={tmp_path / 'fork'}"]
    kill = [f"--trainer.callbacks+={__name__}.KillLater", "--trainer.callbacks.after=5"]
    with pytest.raises(SystemExit):
        main([*fork, *kill, f"--ckpt_path={source}"])
    rewrite_json(source, "checkpoint.json", lambda document: document.update(saved_at="2999-01-01T00:00:00+00:00"))
    with pytest.raises(SystemExit):
        main([*fork, "--ckpt_path=auto"])
    assert f"{source} was saved again since, at step 4" in " ".join(capsys.readouterr().err.split())


def test_a_start_that_only_validates_is_recorded_if_branch_or_versions_are_others(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same settings. So that reports show its branch."""
    save = ["+=ModelCheckpoint", ".every_n_train_steps=2", ".filename={step}", ".save_top_k=-1"]
    fit = [*command, "--model.train_tokens=256", *(f"--trainer.callbacks{one}" for one in save)]
    saved = tmp_path / "run/checkpoints"

    def parents(resumed: str) -> list[int | None]:
        main([*fit, f"--ckpt_path={saved / resumed}"])
        return [one["parent"] for one in json.loads((tmp_path / "run/starts.json").read_text())]

    main(fit)
    assert parents("step=2.ckpt") == [None, 0]  # saves step=4-v1.ckpt
    assert parents("step=4-v1.ckpt") == [None, 0]
    assert parents("step=4.ckpt") == parents("step=4.ckpt") == [None, 0, 0]
    monkeypatch.setattr("nlgmoe.cli.run_folder.versions", lambda: {"nlgmoe": "another"})
    assert parents("step=4.ckpt") == [None, 0, 0, 0]
    results = []
    for rate, resumed in (("0.1", "step=4.ckpt"), ("0.5", "step=2.ckpt"), ("0.1", "step=4.ckpt")):
        again = ["--trainer.limit_val_batches=0", f"--model.optimizer.lr={rate}", f"--ckpt_path={saved / resumed}"]
        main([*fit, *again])
        results.append(json.loads((tmp_path / "run/summary.json").read_text())["train_loss"])
    assert results[0] == results[2] != results[1]  # without steps and without a validation


def test_a_start_that_is_refused_saves_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are not those whose validation the best checkpoint has been kept for."""
    best = ["+=ModelCheckpoint", ".monitor=val/loss", ".filename=best", ".enable_version_counter=false"]
    fit = [*command, *(f"--trainer.callbacks{one}" for one in [*best, ".save_on_exception=true"])]
    main([*fit, "--model.train_tokens=256"])
    saved = tmp_path / "run/checkpoints/best.ckpt"
    before = read_document(saved)["saved_at"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(MoEGPTModule, "on_train_start", lambda _: 1 / 0)
        main([*fit, "--model.train_tokens=512", "--ckpt_path=last"])
    assert read_document(saved)["saved_at"] == before
    within = f"--trainer.callbacks+={__name__}.FailWithin"
    with pytest.raises(SystemExit):  # the weights are of step 6, and the clock is at step 5
        main([*fit, "--model.train_tokens=512", "--ckpt_path=last", within])
    assert read_document(saved)["saved_at"] == before
    with pytest.raises(SystemExit):  # after a step it does
        main([*fit, "--model.train_tokens=512", "--ckpt_path=last", f"--trainer.callbacks+={__name__}.KillLater"])
    assert read_document(saved)["global_step"] == 7


class FailWithin(Callback):
    """Fails at the end of the second optimizer step, before the loop counts it."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        calls: list[Any] = []

        def fail(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) == 2:
                raise RuntimeError("out of memory")

        trainer.optimizers[0].register_step_post_hook(fail)


def test_a_new_run_forgets_what_an_earlier_start_would_have_resumed(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is killed before its own first step."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RESUMING).write_text(json.dumps({"checkpoint": "/gone/last.ckpt", "step": 4}))
    with pytest.raises(SystemExit):
        main([*command, "--ckpt_path=auto"])
    monkeypatch.setattr(MoEGPTModule, "on_train_start", killed)
    with pytest.raises(SystemExit):
        main([*command, "--model.train_tokens=256"])
    assert not (tmp_path / "run" / RESUMING).exists()


def test_a_finished_run_that_is_validated_with_other_settings_says_so(command: list[str], tmp_path: Path) -> None:
    """It trains nothing, so `config.yaml` stays; its results are of the settings of the last start."""
    folder, other = tmp_path / "run", tmp_path / "other"
    fit = [*command, "--model.train_tokens=256"]
    main([*fit, "--data.max_eval_windows=1"])
    main([*fit, "--data.max_eval_windows=1", f"--trainer.default_root_dir={other}"])
    trained, losses = (folder / "config.yaml").read_bytes(), []
    for windows in (1, 3, 3):
        main([*fit, f"--data.max_eval_windows={windows}", "--ckpt_path=auto"])
        losses.append(json.loads((folder / "summary.json").read_text())["val_loss"])
    assert losses[0] != losses[1] and (folder / "config.yaml").read_bytes() == trained
    first, second = json.loads((folder / "starts.json").read_text())  # none for what has changed nothing
    assert (first["step"], second["step"], second["parent"]) == (0, 4, 0)
    assert "max_eval_windows: 3" in (folder / second["config"]).read_text()
    runs = read_runs([folder, other])
    assert any("From step 4 on: data.max_eval_windows 1 -> 3" in issue for issue in runs[0].issues)
    assert "data.max_eval_windows differs" in other_tokens(runs)
    main([*command, "--model.train_tokens=320", "--data.max_eval_windows=1", "--ckpt_path=auto"])
    assert other_tokens(read_runs([folder, other])) == ""


def test_a_run_that_returns_to_a_branch_shows_nothing_of_the_one_between(
    command: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """It goes back to step 4 with another rate, is killed at step 7, and goes on from step 8 of the first branch."""
    keepers = tmp_path / "keepers.yaml"
    every = {"every_n_train_steps": 4, "filename": "step-{step}", "auto_insert_metric_name": False, "save_top_k": -1}
    best = every | {"every_n_train_steps": None, "monitor": "val/loss", "filename": "best-{step}"}
    keepers.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "callbacks": [
                        {
                            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                            "init_args": one | {"enable_version_counter": False},
                        }
                        for one in (every, best)
                    ]
                    + [{"class_path": "SampleText", "init_args": {"prompts": ["a"], "max_new_tokens": 1}}],
                    "val_check_interval": 3,
                    "log_every_n_steps": 1,
                    "logger": None,
                }
            }
        )
    )

    def train(folder: str, steps: int, *more: str) -> Path:
        place = [f"--trainer.default_root_dir={tmp_path / folder}", f"--model.train_tokens={64 * steps}"]
        main([*command, f"--config={keepers}", *place, *more])
        return tmp_path / folder

    train("undisturbed", 8)
    undisturbed = train("undisturbed", 10, "--ckpt_path=last")
    run = train("run", 8)
    saved, first_samples = run / "checkpoints", (run / "samples.txt").read_text()
    kill = "--trainer.callbacks+=tests.cli.test_run_folder.KillLater"
    for after, validated in ((5, None), (7, 6)):
        back = [f"--ckpt_path={saved / 'step-4.ckpt'}", kill, f"--trainer.callbacks.after={after}"]
        with pytest.raises(SystemExit):
            train("run", 16, "--model.optimizer.lr=0.01", *back)
        (ours,) = read_runs([run])
        assert re.findall(r"=== step (\d+)", ours.samples) == (["3"] if validated is None else ["3", "6"])
        assert (None if ours.specialisation is None else ours.specialisation.step) == validated
    lost = (run / "expert_load.csv").read_text()
    assert lost.splitlines()[-1].startswith("6,")
    whole = (undisturbed / "expert_load.csv").read_text().splitlines()
    rows = [line for line in whole if not line.startswith(("4,", "5,", "6,", "7,"))]
    trained = (run / "starts/0-step-0.yaml").read_text()
    assert (run / "config.yaml").read_text() != trained
    back = [f"--ckpt_path={saved / 'step-8.ckpt'}"]  # it is at its end there, and takes no step
    unvalidated = tmp_path / "unvalidated.yaml"
    samples = {"class_path": "SampleText", "init_args": {"prompts": ["a"], "max_new_tokens": 1}}
    unvalidated.write_text(yaml.safe_dump({"trainer": {"limit_val_batches": 0, "callbacks": [samples]}}))
    train("run", 8, f"--ckpt_path={saved / 'best-8.ckpt'}", f"--config={unvalidated}")  # which has the text of step 8
    (ours,) = read_runs([run])
    assert (run / "samples.txt").read_text() == first_samples and ours.specialisation is None
    train("run", 8, *back)
    (ours,) = read_runs([run])
    assert ours.specialisation is not None and ours.specialisation.step == 8
    assert re.findall(r"=== step (\d+)", ours.samples) == ["3", "6", "8"]
    assert (run / "samples.txt").read_text() == first_samples
    assert (run / "config.yaml").read_text() == trained and not [one for one in ours.issues if "lr" in one]
    assert ours.metrics["train/loss"].steps.tolist() == list(range(8))
    assert ours.loads is not None and ours.loads.steps.tolist() == [1, 2, 3, 4]
    recwarn.clear()
    train("run", 10, f"--ckpt_path={saved / 'step-8.ckpt'}")
    told = " ".join(str(one.message) for one in recwarn)
    ours, expected = read_runs([run, undisturbed])
    for name in ("train/loss", "train/lr", "val/loss"):
        assert ours.metrics[name].steps.tolist() == expected.metrics[name].steps.tolist(), name
        assert ours.metrics[name].values.tolist() == expected.metrics[name].values.tolist(), name
    assert not [issue for issue in ours.issues if issue.startswith("From step") and "lr" in issue]
    assert any(issue.startswith("The run went back to step 4, and then returned to step 8") for issue in ours.issues)
    assert (run / "expert_load.csv").read_text().splitlines() == rows
    assert "the run went back to step 4 before, and returns to step 8 of an earlier branch" in told
    assert "was saved again after the checkpoint that is resumed" in told
    with pytest.raises(SystemExit):
        train("run", 16, "--ckpt_path=last", kill, "--trainer.callbacks.after=11")
    (ours,) = read_runs([run])
    assert ours.specialisation is not None and ours.specialisation.step == 10


def test_a_start_that_only_validates_leaves_no_branch(command: list[str], tmp_path: Path) -> None:
    """It validates an earlier checkpoint; what was logged after that stays."""
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    save += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename=step-{step}"]
    fit = [*command, *save, "--trainer.callbacks.auto_insert_metric_name=false"]
    main([*fit, "--model.train_tokens=384"])
    rows = (tmp_path / "run/expert_load.csv").read_text()
    for step, tokens in ((4, 256), (6, 448)):
        main([*fit, f"--model.train_tokens={tokens}", f"--ckpt_path={tmp_path}/run/checkpoints/step-{step}.ckpt"])
        if step == 4:
            (run,) = read_runs([tmp_path / "run"])
            assert run.loads is not None and run.loads.steps.max() == 4
    assert (tmp_path / "run/expert_load.csv").read_text().startswith(rows)
    (run,) = read_runs([tmp_path / "run"])
    assert not [issue for issue in run.issues if issue.startswith("The run went back")]


def test_a_fork_that_saves_elsewhere_and_is_killed_before_its_first_step_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has saved a validation that was due; the folder has no record of it yet."""
    with pytest.raises(SystemExit):
        main([*command, "--model.train_tokens=384", f"--trainer.callbacks+={__name__}.Terminate"])
    best = ["+=ModelCheckpoint", f".dirpath={tmp_path / 'out'}", ".monitor=val/loss", ".filename=best"]
    fork = [*command, *(f"--trainer.callbacks{one}" for one in best), "--model.train_tokens=384"]
    fork += [f"--trainer.default_root_dir={tmp_path / 'fork'}"]
    source = tmp_path / "run/checkpoints/last.ckpt"
    with pytest.raises(SystemExit):
        kill = ["--trainer.callbacks+=tests.cli.test_run_folder.Terminate", "--trainer.callbacks.kill=4"]
        main([*fork, *kill, f"--ckpt_path={source}"])
    assert read_document(tmp_path / "out/best.ckpt")["global_step"] == 4
    main([*fork, f"--ckpt_path={tmp_path / 'out/best.ckpt'}"])
    (start,) = json.loads((tmp_path / "fork/starts.json").read_text())
    assert start["step"] == 4


class Terminate(Callback):
    """Gets a signal at the end of the fourth step, whose validation is due; or `kill` ends the run after so many steps."""

    def __init__(self, kill: int = 0) -> None:
        self.kill = kill

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.kill and trainer.global_step == self.kill:
            killed()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4 and not self.kill:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("killed_at", [4, 5])
def test_a_run_that_saves_the_resumed_checkpoint_again_goes_on_from_it(
    killed_at: int, command: list[str], tmp_path: Path
) -> None:
    """After the validation that was due; it is killed before its first step, or after that."""
    saved = tmp_path / "run/checkpoints/last.ckpt"
    keeper = ["ModelCheckpoint", "filename=last", "enable_version_counter=false"]
    fit = [*command, "--model.train_tokens=384", f"--trainer.callbacks+={keeper[0]}"]
    fit += [f"--trainer.callbacks.{one}" for one in keeper[1:]]
    times = []
    for kill in (0, killed_at):
        end = ["--trainer.callbacks+=tests.cli.test_run_folder.Terminate", f"--trainer.callbacks.kill={kill}"]
        with pytest.raises(SystemExit):
            main([*fit, *end, "--ckpt_path=auto"])
        times.append(read_document(saved)["saved_at"])
    assert times[0] < times[1] and read_document(saved)["global_step"] == 4
    main([*fit, "--ckpt_path=auto"])
    starts = json.loads((tmp_path / "run/starts.json").read_text())
    assert [(one["step"], one["parent"]) for one in starts] == [(0, None), (4, 0), (4, 1)]
    assert [one["trained"] for one in starts] == [True, killed_at == 5, True]
    (run,) = read_runs([tmp_path / "run"])
    assert run.metrics["val/loss"].steps.tolist() == [4, 6]


def test_a_fork_at_its_end_is_no_run_yet(command: list[str], tmp_path: Path) -> None:
    main([*command, "--model.train_tokens=256"])
    fork = [*command, f"--trainer.default_root_dir={tmp_path / 'fork'}"]
    fork += [f"--ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}"]
    main([*fork, "--model.train_tokens=256"])
    with pytest.raises(SystemExit):  # a new run would replace its `last.ckpt`
        main([*fork[:-1], "--model.train_tokens=192"])
    main([*fork, "--model.train_tokens=320"])  # as the warning of the first one says
    (start,) = json.loads((tmp_path / "fork/starts.json").read_text())
    assert start["step"] == 4
    (run,) = read_runs([tmp_path / "fork"])
    assert run.metrics["val/loss"].steps.tolist() == [5]  # the first fork may have been of another run


def test_a_moved_run_goes_on_from_its_own_checkpoint(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went back to an earlier one, and was killed before its first step."""
    save = ["+=ModelCheckpoint", ".every_n_train_steps=2", ".filename={step}", ".save_top_k=-1"]
    fit = [*command, *(f"--trainer.callbacks{one}" for one in save)]
    main([*fit, "--model.train_tokens=256"])
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(MoEGPTModule, "on_train_start", killed)
        main([*fit, "--model.train_tokens=384", f"--ckpt_path={tmp_path}/run/checkpoints/step=2.ckpt"])
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    main([*fit, "--model.train_tokens=384", "--ckpt_path=auto", f"--trainer.default_root_dir={tmp_path / 'copy'}"])
    assert json.loads((tmp_path / "copy/starts.json").read_text())[-1]["checkpoint"] == "checkpoints/step=2.ckpt"
    backup = (tmp_path / "run/checkpoints/step=4.ckpt").rename(tmp_path / "backup.ckpt")
    main([*fit, "--model.train_tokens=384", f"--ckpt_path={backup}"])  # the run's own
    assert json.loads((tmp_path / "run/starts.json").read_text())[-1]["parent"] == 0


def test_what_a_callback_logs_over_something_else_is_no_step_of_a_run(tmp_path: Path) -> None:
    rows = "step,train/loss,by_position\n0,8,\n1,7,\n20,,5\n"
    (tmp_path / "metrics.csv").write_text(rows)
    keepers = [ModelCheckpoint(tmp_path, every_n_train_steps=10)]
    assert step_past_first_save(tmp_path, keepers) is None and step_past_first_save(tmp_path, []) == 1


def test_a_copy_of_a_run_does_not_save_into_the_checkpoints_of_the_first(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have a link to the same disk, or one has a link to the other's checkpoints."""
    disk, run, copy = tmp_path / "disk", tmp_path / "run", tmp_path / "copy"
    disk.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    main([*command, "--model.train_tokens=128"])
    saved = read_document(disk / "last.ckpt")
    shutil.copytree(run, copy, symlinks=True)
    more = ["--model.train_tokens=256", "--ckpt_path=auto"]
    for linked in (True, False):
        if not linked:
            (run / "checkpoints").unlink()
            disk = disk.rename(run / "checkpoints")
            (disk / ".run_folder").unlink()
            (copy / "checkpoints").unlink()
            (copy / "checkpoints").symlink_to(disk)
        with pytest.raises(SystemExit):
            main([*command, *more, f"--trainer.default_root_dir={copy}"])
        told = " ".join(capsys.readouterr().err.split())
        assert f"has the checkpoints of {run}, which {copy} would replace" in told
        assert read_document(disk / "last.ckpt") == saved
    moved, disk = run.rename(tmp_path / "moved"), tmp_path / "moved/checkpoints"
    main([*command, *more, f"--trainer.default_root_dir={moved}"])
    assert read_document(disk / "last.ckpt")["global_step"] == 4


class KillLater(Callback):
    """Ends a run after so many steps."""

    def __init__(self, after: int = 7) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after:
            raise ValueError("killed")


def test_a_damaged_record_of_starts_is_told_before_anything_is_lost(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main([*command, "--model.train_tokens=128"])
    shutil.rmtree(run / "starts")
    main([*command, "--model.train_tokens=192", "--ckpt_path=last"])
    starts = (run / "starts.json").read_text()
    assert [Path(start["config"]).name for start in json.loads(starts)] == ["0-step-0.yaml", "1-step-2.yaml"]
    for damaged in (starts[:30], "[{}]", "3"):
        (run / "starts.json").write_text(damaged)
        with pytest.raises(SystemExit):
            main([*command, "--model.train_tokens=256", "--ckpt_path=last"])
        assert f"error: {run / 'starts.json'} is damaged; remove it" in capsys.readouterr().err
        assert (run / "summary.json").exists()
    (run / "starts.json").unlink()
    shutil.rmtree(run / "starts")  # a run of an older version has neither
    main([*command, "--model.train_tokens=256", "--ckpt_path=last"])
    assert [start["step"] for start in json.loads((run / "starts.json").read_text())] == [0, 3]


def test_the_home_folder_is_that_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here.yaml").write_text("data: {data_dir: ~/pile}\ntrainer: {default_root_dir: '~/run'}")
    found = parse_config(
        [ROOT / "configs/quickstart.yaml", tmp_path / "here.yaml"], model__warm_start__checkpoint="~/a.ckpt"
    )
    assert found["data"]["data_dir"] == f"{tmp_path}/pile"
    assert found["trainer"]["default_root_dir"] == f"{tmp_path}/run"
    assert found["model"]["warm_start"]["checkpoint"] == f"{tmp_path}/a.ckpt"
    assert _with_home(["a", "~/a", "--b=~/b", "--prompt=~/c", "--prompt", "~/d"]) == [
        "a",
        f"{tmp_path}/a",
        f"--b={tmp_path}/b",
        "--prompt=~/c",
        "--prompt",
        "~/d",
    ]
    nlgmoe_command.main(["configs", "copy", "quickstart.yaml", "--output=~/mine"])
    assert (tmp_path / "mine/quickstart.yaml").is_file()


def test_an_evaluation_leaves_the_rows_of_training_alone(command: list[str], tmp_path: Path) -> None:
    own = json.dumps(
        {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path / "run"), "name": "", "version": ""},
        }
    )
    main([*command, "--model.train_tokens=128", f"--trainer.logger={own}"])
    rows = (tmp_path / "run/metrics.csv").read_text()
    main(["validate", *command[1:], f"--trainer.logger={own}", "--ckpt_path=last"])
    assert (tmp_path / "run/metrics.csv").read_text() == rows
    main([*command, "--model.train_tokens=256", f"--trainer.logger={own}", "--ckpt_path=last"])
    assert (tmp_path / "run/metrics.csv").read_text().startswith(rows)


def test_python_keeps_a_run_folder_as_the_command_does(
    pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations of other weights or text are no rows of the run, and two processes do not train in one folder."""
    words = [
        *TINY,
        "--model.train_tokens=64",
        f"--data.data_dir={pocket_pile}",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    settings: dict[str, Any] = dict(word[2:].replace(".", "__").split("=", 1) for word in words)
    settings["trainer__callbacks"] = []

    def call(what: str, **more: Any) -> None:
        made = load_config(ROOT / "configs/quickstart.yaml", **(settings | more))
        getattr(made.trainer, what)(made.module, made.data)

    call("fit")
    rows = (tmp_path / "metrics.csv").read_text()
    call("validate", data__max_eval_windows=1)
    assert (tmp_path / "metrics.csv").read_text() == rows
    another = load_config(
        ROOT / "configs/quickstart.yaml", **(settings | {"trainer__default_root_dir": str(tmp_path / "another")})
    )
    old = load_config(ROOT / "configs/quickstart.yaml", **settings)
    another.trainer.validate(old.module, old.data, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    another.trainer.fit(another.module, another.data)
    (start,) = json.loads((tmp_path / "another/starts.json").read_text())
    assert (start["step"], start["checkpoint"]) == (0, None)  # nothing of what was evaluated before
    monkeypatch.setattr("nlgmoe.cli.ownership.FileLock", lambda path, **_: FileLock(path, timeout=0))
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process trains in"):
        call("fit")


def test_load_config_tells_that_it_resumes_nothing() -> None:
    with pytest.warns(UserWarning, match="resumes nothing: give ckpt_path=last to"):
        load_config(ROOT / "configs/quickstart.yaml", ckpt_path="last")


def test_what_ends_a_run_comes_before_what_logs_its_last_step_or_begins_the_next(tmp_path: Path) -> None:
    run = load_config(ROOT / "configs/dense/laptop.yaml", trainer__max_time="00:01:00:00")
    assert {type(one).__name__ for one in run.trainer.callbacks[:2]} == {"SaveOnSignal", "Timer"}


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


def test_the_last_checkpoint_is_saved_once_the_best_one_is_known(tmp_path: Path) -> None:
    keeper = "class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args"
    (tmp_path / "more.yaml").write_text(
        f"trainer: {{callbacks: [{{{keeper}: {{every_n_train_steps: 5}}}}, {{{keeper}: {{monitor: val/loss}}}}]}}"
    )
    run = load_config([ROOT / "configs/dense/laptop.yaml", tmp_path / "more.yaml"])
    assert [one.monitor for one in run.trainer.checkpoint_callbacks] == ["val/loss", None]


@pytest.mark.parametrize("text", ["1234e5", "1.5e5", ".5e3", "08", "1_0", "0x1F", "1:30", "2024-01-01", "no"])
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
    with pytest.raises(ValueError, match=r"wrong.yaml, line 3\).*did you mean WriteReport"):
        load_config([quickstart, tmp_path / "wrong.yaml"], **here)


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
    assert [path.name for path in new.rglob("*") if path.is_file()] == [".lock"]
    main([*command, "--model.train_tokens=64", f"--trainer.default_root_dir={run}"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main([*command, *tried, f"--trainer.default_root_dir={run}", "--ckpt_path=last"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("precision", "native", "told"), [("bf16-mixed", False, 1), ("bf16-true", True, 0), ("32-true", False, 0)]
)
def test_a_processor_without_products_in_bf16_is_told(
    precision: str, native: bool, told: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    load_config(ROOT / "configs/quickstart.yaml", trainer__precision=precision)
    assert sum("no instructions for products in bf16" in str(warning.message) for warning in recwarn) == told
