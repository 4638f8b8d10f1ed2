"""Trainers, callbacks, teachers and modules in Python that serve twice, or between two steps: each run counts its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint

from nlgmoe.callbacks import ExpertLoad, RunSummary, StagedDistillation, Throughput
from nlgmoe.checkpoint.folder import read_document
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.module import MoEGPTModule
from tests.synthetic import SyntheticData
from tests.test_module import CONFIG, trainer

VALIDATES: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


def totals(*callbacks: Callback) -> list[Any]:
    """What they have counted, without times and the peak of the process's memory."""
    states = [one.state_dict() for one in callbacks]
    return [
        {name: value for name, value in state.items() if not name.endswith(("elapsed", "seconds", "memory_bytes"))}
        for state in states
    ]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("baseline")
    keeper = ModelCheckpoint(folder, "best", monitor="val/loss", save_last=True)
    stopper = EarlyStopping("val/loss", patience=9)
    run = trainer(
        folder, RunSummary(), Throughput(), stopper, keeper, max_steps=6, enable_checkpointing=True, **VALIDATES
    )
    run.fit(MoEGPTModule(CONFIG), SyntheticData())
    return folder / "last.ckpt"


def test_a_run_after_an_evaluation_counts_its_own_steps(baseline: Path, tmp_path: Path) -> None:
    counted = []
    for evaluates in (False, True):
        folder = tmp_path / str(evaluates)
        callbacks = RunSummary(), Throughput()
        run = trainer(folder, *callbacks, max_steps=3, **VALIDATES)
        if evaluates:
            run.validate(MoEGPTModule(CONFIG), SyntheticData(), ckpt_path=baseline, verbose=False)
        run.fit(MoEGPTModule(CONFIG), SyntheticData())
        counted.append(totals(*callbacks))
    assert counted[0] == counted[1]


def test_callbacks_of_a_second_run_count_its_own_steps(tmp_path: Path) -> None:
    callbacks = RunSummary(), Throughput()
    found = []
    for _ in range(2):
        trainer(tmp_path, *callbacks, max_steps=3).fit(MoEGPTModule(CONFIG), SyntheticData())
        found.append(totals(*callbacks))
    assert found[0] == found[1]


def test_a_run_from_what_was_evaluated_at_step_0_is_saved(tmp_path: Path) -> None:
    saved = tmp_path / "zero.ckpt"
    save = LambdaCallback(on_train_start=lambda trainer, module: trainer.save_checkpoint(saved))
    trainer(tmp_path, save, max_steps=1).fit(MoEGPTModule(CONFIG), SyntheticData())
    assert read_document(saved)["global_step"] == 0
    module = MoEGPTModule(CONFIG)
    trainer(tmp_path).validate(module, SyntheticData(), ckpt_path=saved, verbose=False)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, SyntheticData())
    run.save_checkpoint(tmp_path / "two.ckpt")
    assert read_document(tmp_path / "two.ckpt")["global_step"] == 2


def test_a_teacher_serves_two_runs(baseline: Path, tmp_path: Path) -> None:
    teacher, logged = MixtureOfStudents(str(baseline)), []
    for callbacks in ([StagedDistillation(step=2)], []):
        run = trainer(
            tmp_path,
            *callbacks,
            LambdaCallback(
                on_train_batch_end=lambda trainer, *_: logged.append(
                    "train/distillation_loss" in trainer.callback_metrics
                )
            ),
            max_steps=3,
        )
        run.fit(MoEGPTModule(CONFIG, distiller=teacher), SyntheticData())
    assert logged == [True, True, False, True, True, True] and teacher.loss_weight == 1


def test_an_interrupted_validation_counts_in_no_other(tmp_path: Path) -> None:
    module, loader = MoEGPTModule(CONFIG), SyntheticData().val_dataloader()

    def interrupt(*arguments: Any) -> None:
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        trainer(tmp_path, LambdaCallback(on_validation_batch_end=interrupt), **VALIDATES).validate(module, loader)
    again, new = (
        trainer(tmp_path, **VALIDATES).validate(one, loader, verbose=False) for one in (module, MoEGPTModule(CONFIG))
    )
    assert again == new


def test_a_probe_of_a_callback_is_not_the_steps_routing(tmp_path: Path) -> None:
    probe = next(iter(SyntheticData().val_dataloader()))
    loads = []
    for probes in (False, True):

        def measure(trainer: Trainer, module: MoEGPTModule, *rest: Any, probes: bool = probes) -> None:
            if probes:
                module.predict_step(probe, 0)

        folder = tmp_path / str(probes)
        run = trainer(
            folder, LambdaCallback(on_train_batch_end=measure), ExpertLoad(), max_steps=3, log_every_n_steps=1
        )
        run.fit(MoEGPTModule(CONFIG), SyntheticData())
        loads.append((folder / "expert_load.csv").read_text())
    assert loads[0] == loads[1] and "0," in loads[0]
