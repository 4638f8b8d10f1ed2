"""`nlgmoe inspect`, from files to what is printed; in this process, since imports cost seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nlgmoe.checkpoint.portable import load_model
from nlgmoe.commands.main import main
from nlgmoe.experiment import load_config
from nlgmoe.hardware import HARDWARE
from nlgmoe.model.counting import count_parameters
from nlgmoe.tools.planner.topology import layout
from tests.support.checkpoints import write

ROOT = Path(__file__).parents[2]
LAPTOP = str(ROOT / "configs" / "pr_moe" / "laptop.yaml")


def inspect(capsys: pytest.CaptureFixture, *args: str) -> str:
    main(["inspect", *args])
    return capsys.readouterr().out


def inspect_json(capsys: pytest.CaptureFixture, *args: str) -> dict[str, Any]:
    return json.loads(inspect(capsys, *args, "--json"))


def test_inspect_reads_a_configuration_as_train_py_does(capsys: pytest.CaptureFixture) -> None:
    found = inspect_json(capsys, LAPTOP, "--hardware=a100-80")
    experiment = load_config(LAPTOP)
    built = experiment.module.gpt
    assert found["params_total"] == sum(parameter.numel() for parameter in built.parameters())
    assert found["params_active"] == count_parameters(experiment.module.config).active
    assert found["inputs"]["model"] == experiment.module.config.to_dict()
    assert found["inputs"]["topology"]["micro_batch_size"] == experiment.data.micro_batch_size
    assert found["memory"]["weights"] == sum(parameter.nbytes for parameter in built.parameters())
    assert found["fits"] is True and found["fits_on"] == list(HARDWARE)
    parts = ("weights", "gradients", "optimizer", "activations")
    assert found["memory"]["total"] == sum(found["memory"][part] for part in parts)


def test_inspect_says_how_many_parameters_each_optimizer_has_and_what_muon_adds(capsys: pytest.CaptureFixture) -> None:
    quickstart = str(ROOT / "configs/quickstart.yaml")
    found, printed = inspect_json(capsys, quickstart), inspect(capsys, quickstart)
    optimizer = load_config(quickstart).module.configure_optimizers()
    sizes = {True: 0, False: 0}
    for group in optimizer.param_groups:
        sizes[group.get("muon", False)] += sum(parameter.numel() for parameter in group["params"])
    assert found["muon"]["parameters"] == sizes[True] and sum(sizes.values()) == found["params_total"]
    assert f"Muon {sizes[True] / 1e6:.3f} M parameters of a rank, AdamW {sizes[False] / 1e6:.3f} M" in printed
    share = found["muon"]["flops"] / (32 * 128 * found["flops_per_token"])
    assert f"FLOP a step of a rank, {share:.0%} of the model's" in printed


def test_inspect_options_override_files_and_later_files_earlier_ones(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"accumulate_grad_batches": 3, "precision": "bf16-mixed"}}))
    options = ("--gpus", "8", "--expert-parallel=8", "--zero", "2", "--micro-batch", "4", "--activation-checkpointing")
    files, several = (inspect_json(capsys, LAPTOP, str(overlay), *words) for words in ((), options))
    names = ("global_batch_size", "precision", "gpus", "expert_parallel_size", "zero_stage", "activation_checkpointing")
    found = [tuple(one["inputs"]["topology"][name] for name in names) for one in (files, several)]
    assert found == [(48, "bf16-mixed", 1, 1, 0, False), (96, "bf16-mixed", 8, 8, 2, True)]
    assert several["expert_parallel_degrees"] == [0, 8, 0, 8, 0, 8]


def test_inspect_takes_ranks_strategy_and_precision_of_the_trainer() -> None:
    trainer = {"devices": "0,2,3", "num_nodes": 2, "strategy": "ddp", "precision": "16"}
    found = layout({"trainer": trainer, "data": {"micro_batch_size": 2}, "model": {}}, {})
    shape = (found.gpus, found.expert_parallel_size, found.zero_stage, found.deepspeed, found.precision)
    assert shape == (6, 1, 0, False, "16-mixed") and found.global_batch_size == 12
    with pytest.raises(ValueError, match=r"trainer\.devices=0 is no rank"):
        layout({"trainer": trainer | {"devices": 0}}, {})
    with pytest.raises(ValueError, match=r"deepspeed_stage_2: train\.py refuses it; write"):
        layout({"trainer": {"strategy": "deepspeed_stage_2"}}, {})


def test_inspect_takes_a_checkpoint_folder_too(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder = write(tmp_path / "last.ckpt", load_config(LAPTOP).module.config)
    found = inspect_json(capsys, str(folder), "--gpus", "4")
    assert found["params_total"] == sum(parameter.numel() for parameter in load_model(folder).parameters())
    assert found["inputs"]["topology"]["gpus"] == 4


def test_inspect_judges_by_the_hardware_and_names_what_fits(capsys: pytest.CaptureFixture) -> None:
    args = (str(ROOT / "configs/moe/1.3b_moe_128.yaml"), "--gpus=64", "--zero=1", "--expert-parallel=64")
    text = inspect(capsys, *args)
    assert "52.4" in text and "fits a100-80, h100, h200" in text
    assert "does not fit: needs" in inspect(capsys, *args, "--hardware=a100-40")
    smaller = ("--activation-checkpointing", "--micro-batch=1", "--hardware=v100-32")
    assert "result                 uses " in inspect(capsys, *args, *smaller)
    found = inspect_json(capsys, *args, *smaller)
    assert found["fits"] and found["fits_on"] == list(HARDWARE)
