"""Trainers, callbacks, teachers and modules in Python that serve twice, or between two steps: each run counts its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, LambdaCallback

from nlgmoe.callbacks import ExpertLoad, RunSummary, StagedDistillation, Throughput
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.module import MoEGPTModule
from tests.checkpoint.runs import SaveAt
from tests.synthetic import SyntheticData
from tests.test_module import CONFIG, trainer


def totals(*callbacks: Callback) -> list[Any]:
    """What they have counted, without times and the peak of the process's memory."""
    clocks = ("elapsed", "seconds", "memory_bytes")
    return [{n: value for n, value in one.state_dict().items() if not n.endswith(clocks)} for one in callbacks]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder, SaveAt(2, folder / "two.ckpt"), max_steps=2).fit(MoEGPTModule(CONFIG), SyntheticData())
    return folder / "two.ckpt"


def test_a_run_counts_its_own_steps_after_another_run_or_an_evaluation(trained: Path, tmp_path: Path) -> None:
    again, counted = (RunSummary(), Throughput()), []
    for callbacks in (again, again, (RunSummary(), Throughput())):
        run = trainer(tmp_path, *callbacks, max_steps=3, limit_val_batches=1.0)
        if callbacks is not again:
            run.validate(MoEGPTModule(CONFIG), SyntheticData(), ckpt_path=trained, verbose=False)
        run.fit(MoEGPTModule(CONFIG), SyntheticData())
        counted.append(totals(*callbacks))
    assert counted[0] == counted[1] == counted[2]


def test_a_teacher_serves_two_runs(trained: Path, tmp_path: Path) -> None:
    teacher, logged = MixtureOfStudents(str(trained)), []
    note = LambdaCallback(
        on_train_batch_end=lambda run, *_: logged.append("train/distillation_loss" in run.callback_metrics)
    )
    for callbacks in ([StagedDistillation(step=2)], []):
        run = trainer(tmp_path, *callbacks, note, max_steps=3)
        run.fit(MoEGPTModule(CONFIG, distiller=teacher), SyntheticData())
    assert logged == [True, True, False, True, True, True] and teacher.loss_weight == 1


def test_a_probe_of_a_callback_is_not_the_steps_routing(tmp_path: Path) -> None:
    batch = next(iter(SyntheticData().val_dataloader()))
    probe = LambdaCallback(on_train_batch_end=lambda run, module, *_: module.predict_step(batch, 0))
    for name, callbacks in {"plain": [], "probed": [probe]}.items():
        run = trainer(tmp_path / name, *callbacks, ExpertLoad(), max_steps=3, log_every_n_steps=1)
        run.fit(MoEGPTModule(CONFIG), SyntheticData())
    loads = [(tmp_path / name / "expert_load.csv").read_text() for name in ("plain", "probed")]
    assert loads[0] == loads[1] and "0," in loads[0]
