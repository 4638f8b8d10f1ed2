"""`nlgmoe student`: the paper's students come out of the paper's teachers; what cannot be is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nlgmoe.commands.main import main
from nlgmoe.experiment import parse_config

CONFIGS = Path(__file__).parents[2] / "configs"


def written(tmp_path: Path, source: Path, *options: str) -> dict[str, Any]:
    output, teacher = tmp_path / "student.yaml", source if source.is_file() else source / "config.yaml"
    main(["student", str(source), *options, f"--output={output}"])
    return parse_config([str(teacher), str(output)])


def in_any_order(settings: dict[str, Any]) -> dict[str, Any]:
    callbacks = sorted(settings["trainer"]["callbacks"], key=lambda callback: callback["class_path"])
    return {**settings, "config": None, "trainer": {**settings["trainer"], "callbacks": callbacks}}


@pytest.mark.parametrize(
    ("teacher", "student", "options"),
    [
        ("pr_moe/350m_pr_moe_32_64", "mos/350m_mos_32_64", ["--num-layers=21", "--step=400000"]),
        ("pr_moe/1.3b_pr_moe_64_128", "mos/1.3b_mos_64_128", ["--num-layers=21", "--fraction=0.7"]),
        ("pr_moe/laptop", "mos/laptop", ["--num-layers=5"]),
    ],
)
def test_the_shipped_students_are_those_of_their_teachers(
    teacher: str, student: str, options: list[str], tmp_path: Path
) -> None:
    found = written(tmp_path, CONFIGS / f"{teacher}.yaml", *options)
    shipped = parse_config(CONFIGS / f"{student}.yaml")
    folder = parse_config(CONFIGS / f"{teacher}.yaml")["trainer"]["default_root_dir"]
    assert found["trainer"]["default_root_dir"] == f"{folder}_student_{found['model']['config']['num_layers']}"
    for settings in (found, shipped):
        del settings["trainer"]["default_root_dir"], settings["data"]["micro_batch_size"]
    assert in_any_order(found) == in_any_order(shipped)


def test_what_is_the_teachers_alone_is_not_the_students(tmp_path: Path) -> None:
    """A teacher that was itself a student, and started from another run."""
    text = yaml.safe_load((CONFIGS / "mos/laptop.yaml").read_text())
    text["model"]["warm_start"] = {"checkpoint": "elsewhere"}
    text["trainer"]["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs/its_own"}}
    source = tmp_path / "teacher.yaml"
    source.write_text(yaml.safe_dump(text))
    found = written(tmp_path, source, "--num-layers=4", "--from-teacher", "--teacher=other.ckpt", "--fraction=0.5")
    assert found["model"]["warm_start"] == {"checkpoint": "other.ckpt", "strict": True, "layers": [0, 1, 2, 3]}
    assert found["model"]["config"]["moe"]["num_experts"] == [16, 32]
    assert found["model"]["distiller"]["init_args"]["teacher"] == "other.ckpt"
    assert found["trainer"]["logger"] is None
    callbacks = found["trainer"]["callbacks"]
    names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
    assert names == ["StagedDistillation", "SaveCheckpoints"]
    assert callbacks[0]["init_args"]["fraction"] == 0.5
    (tmp_path / "student.yaml").unlink()
    assert written(tmp_path, source, "--num-layers=4", "--teacher=other.ckpt")["model"]["warm_start"] is None


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("pr_moe/laptop.yaml", ["--num-layers=6"], "num_layers=6 must be at least 1 and below the teacher's 6"),
        ("pr_moe/laptop.yaml", ["--num-layers=5", "--step=5", "--fraction=0.5"], "fraction=0.5 are two ends"),
        ("pr_moe", ["--num-layers=5"], "is in no run's folder: there is no config.yaml above it"),
    ],
)
def test_what_makes_no_student_is_named(
    source: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["student", str(CONFIGS / source), *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
