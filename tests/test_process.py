"""Freed memory is kept on CPUs; a notebook's process is prepared as that of train.py; an import changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlgmoe.module import MoEGPTModule
from nlgmoe.process import prepare_allocator, prepare_process
from nlgmoe.run.trainer import RunTrainer
from tests.support.processes import python
from tests.support.synthetic import SyntheticData
from tests.support.trainers import CONFIG

# Faults of a page while 64 MB are asked for and given back eight times, the first time apart.
COUNT = """
import resource, torch
from nlgmoe.process import prepare_allocator, keep_freed_memory
{call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16_000_000)
before = faults()
for _ in range(7):
    torch.ones(16_000_000)
print(faults() - before)
"""


def faults(call: str, **environment: str) -> int:
    return int(python("-c", COUNT.format(call=call), env=environment).stdout)


def test_process_does_not_ask_for_freed_memory_again() -> None:
    assert faults("prepare_allocator(torch.device('cpu'))") < 1000
    assert faults("assert not keep_freed_memory()", MALLOC_ARENA_MAX="2") > 50_000  # the environment's own settings win


def fresh(code: str) -> str:
    environment = {name: os.environ[name] for name in os.environ.keys() - {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()


def test_import_nlgmoe_changes_nothing() -> None:
    code = """
import os, sys, warnings
before = dict(os.environ), list(warnings.filters)
import nlgmoe
assert before == (dict(os.environ), list(warnings.filters)) and "torch" not in sys.modules
"""
    assert fresh(code) == ""


def test_process_of_a_notebook_is_prepared_as_that_of_train_py(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = """
import sys
from nlgmoe import load_config
class Finder:  # is asked before a module is imported
    def find_spec(self, name, *_):
        if name == "torch":
            import os
            print(os.environ["GOMP_SPINCOUNT"])
            raise SystemExit
assert "torch" not in sys.modules
sys.meta_path.insert(0, Finder())
load_config("configs/moe/laptop.yaml")
"""
    assert fresh(code) == "1000"
    prepared: list[torch.device] = []
    monkeypatch.setattr("nlgmoe.run.trainer.prepare_allocator", prepared.append)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    RunTrainer(default_root_dir=tmp_path, fast_dev_run=1, **quiet).fit(MoEGPTModule(CONFIG), SyntheticData())
    RunTrainer(default_root_dir=tmp_path, **quiet).validate(MoEGPTModule(CONFIG), SyntheticData(), verbose=False)
    assert prepared == [torch.device("cpu")] * 2


def test_threads_and_segments_are_set_unless_the_environment_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"GOMP_SPINCOUNT": "1000", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for given in ({}, dict.fromkeys(ours, "7"), {"OMP_WAIT_POLICY": "active", "PYTORCH_CUDA_ALLOC_CONF": "7"}):
        monkeypatch.setattr(os, "environ", dict(given))
        prepare_process()
        prepare_allocator(torch.device("cuda"))
        assert os.environ == (given if "OMP_WAIT_POLICY" in given else ours | given)
