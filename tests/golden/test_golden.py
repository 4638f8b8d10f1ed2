"""The numbers are still the same as when `tests/golden/make.py` wrote these files."""

import json
from pathlib import Path

import pytest
import torch

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.config import GPTConfig
from tests.golden import recording as golden

ROOT = Path(__file__).parents[2]
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
def test_losses_of_20_steps_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    found = golden.family_losses(name, family(name), tmp_path)
    assert found == pytest.approx(RECORD["families"][name]["losses"], rel=1e-5)


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_a_checkpoint_is_whole_and_its_run_goes_on(name: str, tmp_path: Path) -> None:
    assert list(find_problems(Checkpoint(golden.CHECKPOINTS[name]))) == []
    found = golden.resumed_losses(golden.CHECKPOINTS[name], tmp_path)
    assert found == pytest.approx(RECORD["resumed"][name], rel=1e-5)


def test_losses_of_a_student_of_recorded_logits_are_the_recorded_ones(tmp_path: Path) -> None:
    assert golden.offline_losses(family("mos"), tmp_path) == pytest.approx(RECORD["offline"], rel=1e-5)
