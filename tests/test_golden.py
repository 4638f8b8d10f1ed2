"""Files that older code has written are read, and the numbers are still the same: `tests/golden/make.py` made them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nlgmoe import load_model
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig
from tests.golden import recording as golden

ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / golden.GOLDEN / "record.json").read_text())


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def family(name: str) -> GPTConfig:
    return GPTConfig.from_dict(RECORD["families"][name]["config"])


@pytest.mark.parametrize("name", golden.FAMILIES)
def test_initial_weights_are_the_same_bits(name: str) -> None:
    found, expected = golden.initial_weights(family(name)), RECORD["families"][name]["initial_weights"]
    assert found.keys() == expected.keys()
    for entry in expected:
        assert found[entry]["sum"] == pytest.approx(expected[entry]["sum"], abs=1e-4), entry
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert found[entry]["digest"] == expected[entry]["digest"], entry


def test_batches_and_noise_are_the_same_bits(tmp_path: Path) -> None:
    assert golden.batches(tmp_path) == RECORD["batches"]
    assert golden.noise() == RECORD["noise"]


@pytest.mark.parametrize("name", golden.FAMILIES)
def test_the_losses_of_20_steps(name: str, tmp_path: Path) -> None:
    found = golden.family_losses(name, family(name), tmp_path)
    assert found == pytest.approx(RECORD["families"][name]["losses"], rel=1e-5)


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_a_checkpoint_is_whole_and_its_run_goes_on(name: str, tmp_path: Path) -> None:
    assert list(find_problems(golden.CHECKPOINTS[name])) == []
    found = golden.resumed_losses(golden.CHECKPOINTS[name], tmp_path)
    assert found == pytest.approx(RECORD["resumed"][name], rel=1e-5)


def test_a_student_learns_from_recorded_logits(tmp_path: Path) -> None:
    assert golden.offline_losses(family("mos"), tmp_path) == pytest.approx(RECORD["offline"], rel=1e-5)


def forget_loaded_modules() -> None:
    """Of exports: they name the folder of one test, others have another."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_an_export_is_loaded_by_transformers_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    expected = load_file(golden.GOLDEN / "exported_logits.safetensors")["logits"]
    forget_loaded_modules()
    model = AutoModelForCausalLM.from_pretrained(golden.EXPORT, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    forget_loaded_modules()
    torch.testing.assert_close(golden.exported_logits(model), expected, rtol=1e-5, atol=1e-6)
    main(["import", str(golden.EXPORT), str(tmp_path / "back.ckpt")])
    back = load_model(tmp_path / "back.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(back.logits(back(golden.TOKENS).hidden), expected, rtol=1e-5, atol=1e-6)
