"""Logits on disk: the teacher's, complete after any kill, refused where they do not belong; and runs resume."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback

from nlgmoe.callbacks import StagedDistillation
from nlgmoe.config import MoEConfig
from nlgmoe.data.sampling import BatchRampUp, batch_size_after
from nlgmoe.distill import record_logits as recording
from nlgmoe.distill.distiller import Distiller, End, RunPosition, samples_before_end
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.offline_teacher import HEADER, POSITION, RECORDS, OfflineTeacher, TeacherLogits
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import SequenceCurriculum
from tests.support.distillation import SAMPLES, STUDENT, TEACHER, record, trained
from tests.support.run_folders import in_process
from tests.support.synthetic import NumberedData, SyntheticData
from tests.support.trainers import Recorder, SaveAt, trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(TEACHER, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def logits(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "logits"
    record(teacher, folder, top_k=8)
    return folder


class Longer(NumberedData):
    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"corpus": "a longer walk"}


class Unnumbered(SyntheticData):
    def fingerprint(self) -> dict[str, str | int]:
        return NumberedData().fingerprint()


def fit(
    root: Path,
    distiller: Distiller,
    *callbacks: Callback,
    data: Any = None,
    resume: Path | None = None,
    **settings: Any,
) -> list[float]:
    recorder = Recorder()
    module = MoEGPTModule(STUDENT, AdamWConfig(lr=1e-2), distiller=distiller, **settings)
    run = trainer(root, *callbacks, recorder, max_steps=4, accumulate_grad_batches=2)
    run.fit(module, data or NumberedData(), ckpt_path=resume)
    return recorder.losses


def test_recorded_logits_of_all_tokens_teach_as_the_teacher_does(teacher: Path, tmp_path: Path) -> None:
    """With padding, documents' borders and sequences that grow from 4 tokens to 16; up to the rounding to half precision."""

    def run(distiller: Distiller) -> tuple[list[float], list[float]]:
        distilled: list[float] = []  # after the first step, at each micro-batch
        loss = LambdaCallback(
            on_train_batch_end=lambda run, *_: (
                distilled.append(float(run.callback_metrics["train/distillation_loss"])) if run.global_step else None
            )
        )
        data = NumberedData(padded=True, documents=True)
        return fit(tmp_path, distiller, loss, data=data, curriculum=SequenceCurriculum(96, 4, 4)), distilled

    recorded = record(teacher, tmp_path / "logits", NumberedData(padded=True, documents=True))
    assert recorded.tail_mass == 0
    online = run(MixtureOfStudents(str(teacher), 0.5, 2.0))
    offline = run(OfflineTeacher(str(tmp_path / "logits"), 0.5, 2.0, teacher=str(teacher)))
    assert offline[0] == pytest.approx(online[0], rel=1e-3) and len(online[1]) == 7
    assert offline[1] == pytest.approx(online[1], rel=2e-2)


def test_offline_teacher_scales_its_weight_by_stage_and_leaves_padding_out_of_the_tail(
    teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "logits"
    done = record(teacher, folder, NumberedData(padded=True), top_k=8)
    distiller = OfflineTeacher(str(folder), 0.5, 2.0)
    fit(tmp_path, distiller, data=NumberedData(padded=True))
    recorded, tails = TeacherLogits(str(folder)), []
    for sample in range(SAMPLES):
        mask = torch.arange(16) < sample * 5 % 16 + 1  # as `tests/support/synthetic.py` pads
        tails.append(torch.from_numpy(recorded.read([sample], 16)[1])[0, mask, -1].double().exp())
    assert done.tail_mass / done.positions == pytest.approx(float(torch.cat(tails).mean()), rel=1e-3)

    distiller.loss_weight = 0.25
    distiller._recording = recorded
    said = distiller.read({"tokens": torch.zeros(1, 16, dtype=torch.long), "samples": [0]}, None)  # type: ignore[typeddict-item]
    assert said is not None and said.weight == 0.5 * 0.25


@pytest.mark.parametrize("saved", [1, 2])
def test_offline_teacher_resumes_before_and_at_its_end(saved: int, logits: Path, tmp_path: Path) -> None:
    """Past the end the folder may be gone; 16 samples are enough for two steps, whatever the run's length."""
    copy, path = tmp_path / "logits", tmp_path / "saved.ckpt"
    shutil.copytree(logits, copy)

    class Counts(OfflineTeacher):
        said = 0

        def read(self, batch: Any, mask: Any) -> Any:
            targets = super().read(batch, mask)
            Counts.said += targets is not None
            return targets

    def run(root: Path, *callbacks: Callback, **settings: Any) -> list[float]:
        return fit(root, Counts(str(copy), 1.0, 2.0), StagedDistillation(step=2), *callbacks, **settings)

    whole = run(tmp_path, SaveAt(2 * saved, path))
    assert Counts.said == 4
    if saved >= 2:
        shutil.rmtree(copy)
    assert run(tmp_path / "resumed", resume=path) == whole[2 * saved :]


def test_distillation_resumes_with_the_teacher_it_had(logits: Path, tmp_path: Path) -> None:
    """A folder of the same name that another teacher was recorded in is refused; another folder is another teacher."""
    folder, saved = tmp_path / "logits", tmp_path / "saved.ckpt"
    shutil.copytree(logits, folder)
    whole = fit(tmp_path, OfflineTeacher(str(folder), 1.0, 2.0), SaveAt(4, saved))
    folder.rename(tmp_path / "moved")
    again = fit(tmp_path, OfflineTeacher(str(tmp_path / "moved"), 1.0, 2.0), resume=saved)
    assert again == whole[4:]
    record(trained(replace(TEACHER, num_layers=2, moe=MoEConfig(2)), tmp_path / "other"), folder, top_k=8)
    with pytest.raises(
        ValueError, match=r"distiller.logits=.*logits: this run has learned from .*, and the weights are"
    ):
        fit(tmp_path, OfflineTeacher(str(folder), 1.0, 2.0), resume=saved)
    folder.rename(tmp_path / "others")
    other = fit(tmp_path, OfflineTeacher(str(tmp_path / "others"), 1.0, 2.0), resume=saved)
    assert other != whole[4:]


def test_recording_killed_anywhere_ends_with_the_same_bytes(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SAMPLES_AT_RISK", 1)  # a micro-batch
    record(teacher, tmp_path / "whole", top_k=5, samples=6)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert set(whole) == {HEADER, RECORDS}
    code, call = -9, 0
    while code == -9:
        call += 1
        folder = tmp_path / str(call)
        code = in_process(partial(record, teacher, folder, top_k=5, samples=6), call, folder)
        record(teacher, folder, top_k=5, samples=6)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole, call
    assert code == 0 and call > 10


def test_recording_leaves_a_folder_of_something_else_as_it_is(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*")
    with pytest.raises(ValueError, match="exists already, and holds no teacher's logits"):
        record(teacher, tmp_path, top_k=5, samples=6)
    assert (tmp_path / ".gitignore").exists()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "no teacher's logits at .*; record them with nlgmoe distill-logits"),
    "unfinished": (lambda folder: (folder / POSITION).touch(), "is not finished; run the"),
    "cut off": (lambda folder: os.truncate(folder / RECORDS, 1000), r"logits.bin has 1,000 bytes, not "),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_recorded_logits_that_are_damaged_are_found(kind: str, logits: Path, tmp_path: Path) -> None:
    strike, message = DAMAGES[kind]
    shutil.copytree(logits, tmp_path / "logits")
    strike(tmp_path / "logits")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, OfflineTeacher(str(tmp_path / "logits"), 1.0, 2.0))


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # teacher's settings, run's settings, message
    "temperature": ({"temperature": 1.0}, {}, r"recorded at temperature=2.0, model.distiller.temperature is 1.0; use"),
    "corpus": ({}, {"data": Longer()}, r"these differ: corpus \(saved: a walk, now: a longer walk\); set"),
    "documents": ({}, {"data": NumberedData(documents=True)}, r"document_attention \(saved: False, now: True\)"),
    "numbers": ({}, {"data": Unnumbered()}, "the data module does not number its samples"),
    "samples": ({}, {"accumulate": 3}, "holds 32 samples, this run distils 48; record that many with --samples 48"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_recorded_logits_of_other_data_or_models_are_refused(kind: str, logits: Path, tmp_path: Path) -> None:
    ours, theirs, message = OTHERS[kind]
    distiller = OfflineTeacher(str(logits), **{"temperature": 2.0, **ours})
    module = MoEGPTModule(STUDENT, distiller=distiller)
    run = trainer(tmp_path, max_steps=4, accumulate_grad_batches=theirs.get("accumulate", 2))
    with pytest.raises(ValueError, match=message) as raised:
        run.fit(module, theirs.get("data") or NumberedData())
    assert "\n" not in str(raised.value)


def test_offline_teacher_refuses_another_teacher_or_student(logits: Path, tmp_path: Path) -> None:
    other = trained(STUDENT, tmp_path)
    with pytest.raises(ValueError, match=r"teacher.ckpt is another teacher than that of model\.distiller\.logits="):
        fit(tmp_path, OfflineTeacher(str(logits), 1.0, 2.0, teacher=str(other)))
    with pytest.raises(ValueError, match=r"recorded with other settings: teacher \(saved: \w+, now: \w+\)"):
        record(other, logits, top_k=8)
    for name in ("vocab_size", "seq_len"):
        header, run = json.loads((logits / HEADER).read_text()) | {name: 99}, SimpleNamespace(datamodule=NumberedData())
        with pytest.raises(ValueError, match=rf"these differ: {name} \(saved: 99, now: \d+\)"):
            OfflineTeacher(str(logits), 1.0, 2.0)._check(header, STUDENT, cast(Trainer, run))


def test_recording_samples_of_a_run_by_hand() -> None:
    """Steps of 4 sequences, then 8; of 4 tokens, then 8."""

    def batch(samples: int) -> int:
        return batch_size_after(samples, 8, 8, BatchRampUp(4, 4, 64))  # 8 sequences from 64 tokens on: 8 samples of 8

    grown = SequenceCurriculum(32, 4, 4)  # 8 tokens from 32 on
    assert samples_before_end(End(None, None), batch, 8, grown) is None
    # tokens fed 16, 32, 96, 160; samples 4, 8, 16, 24
    ends = [samples_before_end(End(tokens, None), batch, 8, grown) for tokens in (1, 16, 17, 32, 33, 97)]
    assert ends == [4, 4, 8, 8, 16, 24]
    assert samples_before_end(End(None, 3), batch, 8, grown) == 16
    assert samples_before_end(End(1000, 3).earlier(End(33, None)), batch, 8, grown) == 16
    assert samples_before_end(End(97, None), batch, 8, grown, RunPosition(32, 2, 8)) == 24
    assert samples_before_end(End(20, None), batch, 8, grown, RunPosition(32, 2, 8)) == 8
    assert StagedDistillation(fraction=0.7).distillation_end(1000) == End(700, None)
