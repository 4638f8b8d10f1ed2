"""A student of a tiny teacher, through train.py's own classes."""

import csv
import shutil
from pathlib import Path

import pytest

from nlgmoe.checkpoint.folder import read_document
from nlgmoe.cli.main import main as nlgmoe
from nlgmoe.cli.train import main
from tests.end_to_end.test_train_cli import ROOT, TINY

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]


def test_a_student_learns_from_a_teacher_and_then_without(pocket_pile: Path, tmp_path: Path) -> None:
    """The laptop's file: the teacher's run folder is enough, 70% of the tokens are distilled, a resumed run needs none."""
    runs = [f"--data.data_dir={pocket_pile}", *TINY, *QUIET, "--model.train_tokens=512"]
    deep = ["--model.config.num_layers=4", "--model.config.moe.num_experts=[2,4]"]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    main(
        [
            "fit",
            "--config",
            str(ROOT / "configs/pr_moe/laptop.yaml"),
            *runs,
            *deep,
            f"--trainer.default_root_dir={teacher}",
        ]
    )
    command = ["fit", "--config", str(ROOT / "configs/mos/laptop.yaml"), *runs]
    command += [f"--trainer.default_root_dir={student}", f"--model.distiller.init_args.teacher={teacher}"]
    main(command)
    with (student / "metrics.csv").open() as file:
        distilled = [row["train/distillation_loss"] for row in csv.DictReader(file) if row["train/loss"]]
    assert [bool(value) for value in distilled] == [True] * 6 + [False] * 2  # steps of 64 tokens: up to 358
    written = tmp_path / "student.yaml"
    nlgmoe(["student", f"{teacher}/checkpoints/last.ckpt", "--num-layers=3", "--from-teacher", f"--output={written}"])
    main(["fit", "--config", str(written)])
    document = read_document(tmp_path / "teacher_student_3/checkpoints/last.ckpt")
    assert document["model_config"]["moe"]["num_experts"] == [4] and document["tokens_seen"] == 512
    shutil.rmtree(teacher)
    main([*command, "--ckpt_path=last", "--model.train_tokens=640"])


def test_a_teacher_that_is_missing_is_named(
    pocket_pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "fit",
        "--config",
        str(ROOT / "configs/mos/laptop.yaml"),
        f"--data.data_dir={pocket_pile}",
        *TINY,
        *QUIET,
    ]
    with pytest.raises(SystemExit):
        main(
            [*command, f"--trainer.default_root_dir={tmp_path}", f"--model.distiller.init_args.teacher={tmp_path}/none"]
        )
    assert f"model.distiller.teacher={tmp_path}/none" in capsys.readouterr().err
