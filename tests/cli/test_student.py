"""`nlgmoe student`: the paper's students come out of the paper's teachers; what cannot be is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nlgmoe import GPT, load_pretrained
from nlgmoe.checkpoint.entries import split_experts
from nlgmoe.cli.train import main as train
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.experiment import parse_config
from nlgmoe.surgery.write_weights import write_weights
from tests.support.checkpoints import TOKENIZER

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


def test_student_leaves_out_settings_of_the_teacher_alone(tmp_path: Path) -> None:
    """A teacher that was itself a student, and started from another run."""
    text = yaml.safe_load((CONFIGS / "mos/laptop.yaml").read_text())
    text["model"]["warm_start"] = {"checkpoint": "elsewhere"}
    text["trainer"]["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs/its_own"}}
    source = tmp_path / "teacher.yaml"
    source.write_text(yaml.safe_dump(text))
    found = written(tmp_path, source, "--num-layers=4", "--blocks=upper", "--teacher=other.ckpt", "--fraction=0.5")
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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported checkpoints of six blocks, NAME.ckpt with NAME.yaml, of which block 1 passes its input on, block 4 nearly."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "text.txt").write_text("The king and the queen went to the town. " * 40)
    moes = {"dense": None, "mixture": MoEConfig(4, expert_interval=2), "pyramid": MoEConfig([2, 4, 4])}
    for name, moe in moes.items():
        model = GPT(GPTConfig(TOKENIZER.vocab_size, 24, 6, 32, 2, init_std=0.1, moe=moe))
        with torch.no_grad():
            for block, factor in ((1, 0.0), (4, 0.2)):
                for entry, parameter in model.blocks[block].named_parameters():
                    parameter *= factor if "down" in entry or "output" in entry else 1
        entries = split_experts(model.state_dict())
        path = folder / f"{name}.ckpt"
        write_weights(path, entries.__getitem__, model.config, TOKENIZER.files, origin="elsewhere")
    return folder


def of_checkpoint(tmp_path: Path, checkpoints: Path, name: str, *options: str) -> tuple[list[int], GPTConfig]:
    """The blocks and the configuration of the student of `NAME.ckpt`, and check that it is built from its blocks."""
    source, output = checkpoints / f"{name}.ckpt", tmp_path / "student.yaml"
    main(["student", str(source), f"--output={output}", f"--text={checkpoints}/text.txt", *options])
    settings = parse_config([str(source.with_suffix(".yaml")), str(output)])
    start = settings["model"]["warm_start"]
    assert start["checkpoint"] == settings["model"]["distiller"]["init_args"]["teacher"] == str(source)
    output.unlink()
    return start["layers"], GPTConfig.from_dict(settings["model"]["config"])


def test_student_leaves_out_first_a_block_that_passes_its_input_on(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert of_checkpoint(tmp_path, checkpoints, "dense", "--num-layers=5")[0] == [0, 2, 3, 4, 5]
    said = capsys.readouterr().out
    assert "blocks left out, with their influence: 1 (0.0000)\nblocks kept, with their influence: 4 (0.0" in said
    found, config = of_checkpoint(tmp_path, checkpoints, "mixture", "--num-layers=4")
    assert found == [0, 2, 3, 5] and config.moe is not None
    assert (config.moe.expert_interval, config.moe.num_experts) == (1, [0, 0, 4, 4])
    main(["student", str(checkpoints / "dense.ckpt"), "--num-layers=5", f"--text={checkpoints}/text.txt"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["warm_start"]["layers"] == [0, 2, 3, 4, 5]
    assert "# blocks left out" in printed  # the ranking does not spoil what is printed


@pytest.mark.parametrize(
    ("name", "options", "blocks", "experts"),
    [
        ("dense", ["--blocks=even"], [0, 2, 3, 5], None),
        ("dense", ["--blocks=upper"], [2, 3, 4, 5], None),
        ("pyramid", [], [2, 3, 4, 5], (2, [4, 4])),
        ("mixture", ["--blocks=[0,2,4,5]"], [0, 2, 4, 5], (2, [0, 4])),
        ("mixture", ["--blocks=[0, 1, 3, 5]"], [0, 1, 3, 5], (1, [0, 4, 4, 4])),
        ("mixture", ["--blocks=[0,1,2,5]"], [0, 1, 2, 5], (2, 4)),  # as in the teacher, and so in its format
        ("pyramid", ["--blocks=influence"], [0, 2, 3, 5], (1, [0, 0, 4, 4])),
    ],
)
def test_student_expresses_each_choice_of_blocks(
    name: str, options: list[str], blocks: list[int], experts: Any, checkpoints: Path, tmp_path: Path
) -> None:
    found, config = of_checkpoint(tmp_path, checkpoints, name, "--num-layers=4", *options)
    moe = config.moe
    assert found == blocks and experts == (moe and (moe.expert_interval, moe.num_experts))


def test_a_student_trains_from_its_blocks(checkpoints: Path, pocket_pile: Path, tmp_path: Path) -> None:
    source, output, run = checkpoints / "mixture.ckpt", tmp_path / "student.yaml", tmp_path / "run"
    options = ["--num-layers=3", "--blocks=[1,3,4]", f"--output={output}"]
    main(["student", str(source), *options])
    words = ["fit", f"--config={source.with_suffix('.yaml')}", f"--config={output}"]
    words += ["--model.train_tokens=96", "--model.optimizer.lr=1e-9"]
    quiet = ["--trainer.enable_progress_bar=false", f"--data.data_dir={pocket_pile}", "--data.max_eval_windows=2"]
    train([*words, f"--trainer.default_root_dir={run}", "--trainer.accelerator=cpu", *quiet])
    ours, theirs = (load_pretrained(path).model for path in (run, source))
    for block, layer in enumerate([1, 3, 4]):
        for name, value in ours.blocks[block].state_dict().items():
            torch.testing.assert_close(value, theirs.blocks[layer].state_dict()[name], rtol=0, atol=1e-6)
    assert ours.config.moe.num_experts == [4, 4, 0]
