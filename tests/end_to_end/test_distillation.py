"""A student of a tiny teacher, through train.py's own classes."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from nlgmoe.cli.train import main
from nlgmoe.commands.main import main as nlgmoe
from tests.support.commands import TINY, rows_of
from tests.support.processes import ROOT

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]


def test_distillation_trains_a_student_with_its_teacher_and_then_without(
    pocket_pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The laptop's file: the teacher's run folder is enough, 70% of the tokens are distilled, a resumed run needs none.

    A second student learns from what the teacher has said, when it is gone.
    """
    runs = [f"--data.data_dir={pocket_pile}", *TINY, *QUIET, "--model.train_tokens=512"]
    deep = ["--model.config.num_layers=4", "--model.config.moe.num_experts=[2,4]"]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    config = str(ROOT / "configs/pr_moe/laptop.yaml")
    main(["fit", "--config", config, *runs, *deep, f"--trainer.default_root_dir={teacher}"])
    command = ["fit", "--config", str(ROOT / "configs/mos/laptop.yaml"), *runs]
    command += [f"--trainer.default_root_dir={student}", f"--model.distiller.init_args.teacher={teacher}"]
    main(command)
    online = distilled(student)
    assert [value != 0 for value in online] == [True] * 6 + [False] * 2  # steps of 64 tokens: up to 358

    written, logits, alone = tmp_path / "student.yaml", tmp_path / "logits", tmp_path / "alone"
    settings = yaml.safe_load((student / "config.yaml").read_text())
    settings["trainer"]["strategy"] = "nlgmoe.ExpertParallelStrategy"  # one process reads what many ranks train on
    written.write_text(yaml.safe_dump(settings))
    nlgmoe(["distill-logits", str(written), "--output", str(logits), "--top-k", "32"])
    assert "12 of 32 tokens" in capsys.readouterr().out
    assert json.loads((logits / "header.json").read_text())["samples"] == 12
    shutil.rmtree(teacher)
    main([*command, "--ckpt_path=last", "--model.train_tokens=640"])
    offline = ["--model.distiller=nlgmoe.OfflineTeacher", f"--model.distiller.init_args.logits={logits}"]
    command = [*command[:3], *runs, f"--trainer.default_root_dir={alone}", *offline]
    main([*command, "--model.distiller.init_args.teacher=null"])
    found = distilled(alone)
    assert [value != 0 for value in found] == [True] * 6 + [False] * 2
    assert 0 < found[0] < online[0]
    with pytest.raises(SystemExit):
        main([*command, "--model.distiller.init_args.teacher=null", "--model.train_tokens=1024", "--ckpt_path=last"])
    assert "holds 12 samples, this run distils 24; record that many" in capsys.readouterr().err


def distilled(run: Path) -> list[float]:
    return [float(row["train/distillation_loss"]) for row in rows_of(run / "metrics.csv") if row["train/loss"]]
