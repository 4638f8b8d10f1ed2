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
        ("pr_moe/laptop", "mos/laptop", ["--num-layers=5"]),
    ],
)
def test_the_shipped_students_are_those_of_their_teachers(
    teacher: str, student: str, options: list[str], tmp_path: Path
) -> None:
    found = written(tmp_path, CONFIGS / f"{teacher}.yaml", *options)
    shipped = parse_config(CONFIGS / f"{student}.yaml")
    assert found["trainer"].pop(
        "default_root_dir"
    ) == f"runs/{Path(teacher).name.replace('laptop', 'laptop_pr_moe')}" + (
        f"_student_{found['model']['config']['num_layers']}"
    )
    del shipped["trainer"]["default_root_dir"]
    assert in_any_order(found) == in_any_order(shipped)


def test_other_forms_of_a_configuration_have_the_same_student(tmp_path: Path) -> None:
    text = yaml.safe_load((CONFIGS / "pr_moe/laptop.yaml").read_text())
    (plain := tmp_path / "plain.yaml").write_text(yaml.safe_dump(text))
    expected = written(tmp_path, plain, "--num-layers=4", "--teacher=x")
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump(text["trainer"]["callbacks"]))
    trainer = text.pop("trainer")
    others = {name: value for name, value in trainer.items() if name != "callbacks"}
    for form in (
        {f"trainer.{name}": value for name, value in trainer.items()},
        {"trainer": others | {"callbacks+": trainer["callbacks"]}},
        {"trainer": others | {"callbacks": str(tmp_path / "callbacks.yaml")}},
    ):
        (tmp_path / "student.yaml").unlink()
        (other := tmp_path / "other.yaml").write_text(yaml.safe_dump(text | form))
        assert in_any_order(written(tmp_path, other, "--num-layers=4", "--teacher=x")) == in_any_order(expected)


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


def test_the_student_of_a_moved_run_is_beside_it(tmp_path: Path) -> None:
    (run := tmp_path / "moved").mkdir()
    (run / "config.yaml").write_text((CONFIGS / "pr_moe/laptop.yaml").read_text())
    assert written(tmp_path, run, "--num-layers=4")["trainer"]["default_root_dir"] == f"{run}_student_4"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("pr_moe/laptop.yaml", ["--num-layers=6"], "--num-layers=6 must be at least 1 and below the teacher's 6"),
        ("pr_moe/laptop.yaml", ["--num-layers=1"], "leaves no MoE layer among num_layers=1"),
        ("pr_moe/laptop.yaml", ["--num-layers=5", f"--output={CONFIGS}/mos/laptop.yaml"], "laptop.yaml exists already"),
        (
            "pr_moe/laptop.yaml",
            ["--num-layers=5", "--step=5", "--fraction=0.5"],
            "step=5 and fraction=0.5 are two ends",
        ),
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


def test_a_fraction_of_an_unknown_length_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = yaml.safe_load((CONFIGS / "pr_moe/laptop.yaml").read_text())
    del text["model"]["train_tokens"]
    source = tmp_path / "teacher.yaml"
    source.write_text(yaml.safe_dump(text))
    with pytest.raises(SystemExit):
        main(["student", str(source), "--num-layers=5"])
    assert "fraction=0.7 is of model.train_tokens" in capsys.readouterr().err
    main(["student", str(source), "--num-layers=5", "--step=9"])
    assert "step: 9" in capsys.readouterr().out
