"""A teacher on ranks: what it says, what the student learns of it, and the end of distillation over a resume.

A cell here is a student (`Cell` in tests/support/ranks.py); its teacher is the fixture `checkpoint`. To add one, add
`(taught, cell)` to `JOBS`, and the cell to the parameters of the test that compares it with one process.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nlgmoe.callbacks import StagedDistillation
from nlgmoe.checkpoint.portable import load_model
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.offline_teacher import OfflineTeacher
from nlgmoe.layers.experts import Experts
from nlgmoe.optim.token_schedule import SequenceCurriculum
from tests.support.cells import DROPLESS
from tests.support.distillation import record
from tests.support.jobs import Found, Jobs
from tests.support.ranks import SAMPLES, Cell, Recorder, make_trainer
from tests.support.synthetic import NumberedData, SyntheticData
from tests.support.trainers import SaveAt

TAUGHT = Cell("taught", 2, 2, moe=DROPLESS, steps=6)  # 4 blocks; the teacher is ALONE, of 6 with 2, 4 and 6 experts
TAUGHT_DDP = replace(TAUGHT, name="taught, ddp", strategy="ddp")
ALONE_TAUGHT = replace(TAUGHT, name="taught alone")


class Hears(Callback):
    """Tokens and logits of the teacher for each of this rank's micro-batches, and the numbers of experts that it has here."""

    def __init__(self) -> None:
        self.said: list[tuple[Tensor, Tensor]] = []
        self.experts: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = pl_module.distiller.model
        if model is not None and not model._forward_hooks:
            self.experts = [len(part.up_weight) for part in model.modules() if isinstance(part, Experts)]
            model.register_forward_hook(self.hear)

    def hear(self, model: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        self.said.append((inputs[0], model.logits(output.hidden)))


@dataclass
class Taught:
    """What `learn` returns: losses of each step, what `Hears` collected, and whether the teacher is gone."""

    losses: list[float]
    said: list[tuple[Tensor, Tensor]]
    experts: list[int]
    gone: bool


def learn(
    cell: Cell, ranks: int, folder: Path, teacher: Path, *callbacks: Callback, resume: Path | None = None
) -> Taught:
    """Train on growing sequences with a teacher for all but the last two steps."""
    recorder, hears, module = Recorder(), Hears(), cell.module()
    module.distiller = MixtureOfStudents(str(teacher), temperature=2.0)
    module.curriculum = SequenceCurriculum(400, 4, 4)
    fit = make_trainer(cell, ranks, folder, StagedDistillation(step=cell.steps - 2), hears, recorder, *callbacks)
    fit.fit(module, SyntheticData(micro_batch_size=SAMPLES // ranks), ckpt_path=resume)
    return Taught(recorder.outcome.losses, hears.said, hears.experts, module.distiller.model is None)


def taught(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> Taught:
    """`learn` from a checkpoint; saves `FOLDER/CELL.ckpt` a step before the teacher goes."""
    return learn(cell, ranks, folder, checkpoint, SaveAt(cell.steps - 3, folder / f"{cell.name}.ckpt"))


def taught_offline(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> list[float]:
    """Losses of a run that learns from `NAME.logits`, what the model of `NAME.ckpt` has said of its samples."""
    recorder, module = Recorder(), cell.module()
    logits = str(checkpoint.with_suffix(".logits"))
    module.distiller = OfflineTeacher(logits, temperature=2.0, teacher=str(checkpoint))
    make_trainer(cell, ranks, folder, recorder).fit(module, NumberedData(micro_batch_size=SAMPLES // ranks))
    return recorder.outcome.losses


def recorded(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> None:
    """Record what the teacher says of all samples, for `taught_offline`."""
    record(checkpoint, checkpoint.with_suffix(".logits"), top_k=8, samples=cell.steps * SAMPLES)


JOBS: Jobs = {
    1: [(taught, ALONE_TAUGHT), (recorded, TAUGHT)],
    2: [(taught, TAUGHT), (taught, TAUGHT_DDP), (taught_offline, TAUGHT)],
}


@pytest.mark.parametrize(("cell", "experts"), [(TAUGHT, [1, 2, 3]), (TAUGHT_DDP, [2, 4, 6])])
def test_teacher_on_ranks_has_the_logits_of_its_checkpoint_and_one_process_losses(
    cell: Cell, experts: list[int], found: Found, checkpoint: Path
) -> None:
    (expected,) = found[taught, ALONE_TAUGHT.name]
    teacher = load_model(checkpoint)
    for rank in found[taught, cell.name]:
        assert rank.gone and rank.experts == experts and len(rank.said) == 4  # of 6 steps
        assert rank.losses == pytest.approx(expected.losses, rel=1e-5)
        assert len({tokens.shape[1] for tokens, _ in rank.said}) > 1  # sequences grow
        for tokens, logits in rank.said:
            torch.testing.assert_close(logits, teacher.logits(teacher(tokens).hidden), rtol=1e-5, atol=1e-5)


def test_distillation_ends_as_planned_after_a_resume_on_other_ranks(
    found: Found, checkpoint: Path, tmp_path: Path
) -> None:
    """Saved by two ranks and resumed on one process."""
    (expected,) = found[taught, ALONE_TAUGHT.name]
    saved = checkpoint.parent / "2" / f"{TAUGHT.name}.ckpt"
    resumed = learn(TAUGHT, 1, tmp_path, checkpoint, resume=saved)
    assert resumed.losses == pytest.approx(expected.losses[3:], rel=1e-5)
    assert len(resumed.said) == 1 and resumed.gone


def test_recorded_logits_teach_two_ranks_as_one(found: Found, checkpoint: Path, tmp_path: Path) -> None:
    expected = taught_offline(TAUGHT, 1, tmp_path, checkpoint)
    assert len(expected) == 6
    for losses in found[taught_offline, TAUGHT.name]:
        assert losses == pytest.approx(expected, rel=1e-5)
