"""A run with a teacher: what the teacher says, that it stays what it was, when it goes, and that such runs resume."""

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from nlgmoe.callbacks import StagedDistillation
from nlgmoe.checkpoint.entries import entry_shapes
from nlgmoe.checkpoint.portable import load_model
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.layers.losses import SoftTargets
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import SequenceCurriculum, distillation_weight
from nlgmoe.pyramid import config_of_blocks, experts_per_layer, student_layers
from tests.support.distillation import STUDENT, TEACHER, trained
from tests.support.synthetic import SyntheticData
from tests.support.trainers import Recorder, SaveAt, trainer

TOKENS = 4 * 16 * 2  # of a step: two micro-batches


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(TEACHER, tmp_path_factory.mktemp("teacher"))


class Watch(Recorder):
    """Losses and metrics by micro-batch, what the teacher read, its logits, and a reference to it."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []
        self.said: list[tuple[Any, torch.Tensor]] = []
        self.reference: Any = lambda: None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = pl_module.distiller.model
        if model is not None and self.reference() is not model:
            self.reference = weakref.ref(model)
            model.register_forward_hook(self.hear)

    def hear(self, model: Any, inputs: Any, output: Any) -> None:
        self.said.append((inputs[0], model.logits(output.hidden)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    root: Path, teacher: Path, *callbacks: Callback, resume: Path | None = None, steps: int = 4, **settings: Any
) -> tuple[Watch, MoEGPTModule]:
    watch = Watch()
    distiller = MixtureOfStudents(str(teacher), beta=0.5, temperature=2.0)
    module = MoEGPTModule(STUDENT, AdamWConfig(lr=1e-2), **{"distiller": distiller, **settings})
    run = trainer(root, *callbacks, watch, max_steps=steps, accumulate_grad_batches=2)
    run.fit(module, SyntheticData(), ckpt_path=resume)
    return watch, module


def dropless(model: GPT) -> GPT:
    for block in model.blocks:
        if block.moe is not None:
            block.moe.router.config = replace(block.moe.router.config, eval_token_dropping=False)
    return model


def test_the_teacher_says_to_the_end_what_its_checkpoint_says(teacher: Path, tmp_path: Path) -> None:
    """Every token of every batch, bit for bit, in evaluation and dropless; the student's checkpoint knows nothing of it."""
    alone = dropless(load_model(teacher))
    watch, module = fit(tmp_path, teacher, SaveAt(8, tmp_path / "end.ckpt"))
    assert len(watch.said) == 8
    for tokens, logits in watch.said:
        assert torch.equal(logits, alone.logits(alone(tokens).hidden))
    entries = {kind: Checkpoint(tmp_path / "end.ckpt").tensors(kind).shapes for kind in ("model", "optimizer")}
    assert entries["model"] == entry_shapes(module.gpt)
    moments = {name for name in entries["optimizer"] if name.startswith("exp_avg/")}
    assert moments == {f"exp_avg/{name}" for name in entries["model"]}
    assert not any("distiller" in name for name, _ in module.named_modules())


def test_distillation_loss_is_of_both_models_with_a_weight_that_falls_along_the_ramp(
    teacher: Path, tmp_path: Path
) -> None:
    """Over the two steps before the end, of which the first begins at half of the ramp."""
    ramp = StagedDistillation(tokens=3 * TOKENS, ramp_tokens=2 * TOKENS)
    watch, _ = fit(tmp_path, teacher, ramp, train_tokens=4 * TOKENS)
    for step, weight in enumerate((1.0, 1.0, 0.5)):
        logged = watch.logged[2 * step + 1]
        total = logged["train/loss"] + 0.5 * weight * logged["train/distillation_loss"]
        total += 0.01 * logged["train/balance_loss"]
        assert sum(watch.losses[2 * step : 2 * step + 2]) == pytest.approx(total, rel=1e-6)
        assert logged["train/distillation_loss"] > 0 and 0 <= logged["train/teacher_agreement"] <= 1


@pytest.mark.parametrize("ids", ["padding", "documents"])
def test_teacher_sees_no_padding_and_no_other_document(ids: str, teacher: Path) -> None:
    """Its logits for a text are those for the text alone, whatever stands around it; its weight is that of the stage."""
    distiller, alone = MixtureOfStudents(str(teacher), beta=0.5), dropless(load_model(teacher))
    distiller.load(STUDENT, torch.empty(0), None)
    distiller.loss_weight = 0.25
    tokens = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(0))
    place = torch.arange(12)
    text = {"padding": (place < 4) | (place >= 7), "documents": place >= 5}[ids]
    batch = {"tokens": tokens} | ({"document": text[None].long()} if ids == "documents" else {})
    said = distiller.read(batch, None if ids == "documents" else text[None])  # type: ignore[arg-type]
    assert isinstance(said, SoftTargets) and said.weight == 0.5 * 0.25
    with torch.no_grad():
        expected = alone.logits(alone(tokens[:, text]).hidden)[0]
    torch.testing.assert_close(said.logits(slice(0, 12))[text], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", [{"step": 2}, {"tokens": 2 * TOKENS - 5}])
def test_the_teacher_is_gone_from_the_end_on(end: dict[str, float], teacher: Path, tmp_path: Path) -> None:
    """It reads the two steps before, and no batch after; nothing keeps it in memory."""
    watch, module = fit(tmp_path, teacher, StagedDistillation(**end), train_tokens=4 * TOKENS)  # type: ignore[arg-type]
    assert len(watch.said) == 4 and len(watch.losses) == 8
    assert module.distiller is not None and module.distiller.model is None
    gc.collect()
    assert watch.reference() is None
    for name in ("train/distillation_loss", "train/teacher_agreement"):
        assert [logged[name] != 0 for logged in watch.logged[1::2]] == [True, True, False, False]


@pytest.mark.parametrize("saved", [2, 3])
def test_distillation_resumes_before_and_after_its_end(saved: int, teacher: Path, tmp_path: Path) -> None:
    """With a ramp and sequences that grow; past the end the teacher's file may be gone."""

    def run(root: Path, file: Path, *callbacks: Callback, **settings: Any) -> Watch:
        staged = StagedDistillation(tokens=112, ramp_tokens=100)
        return fit(root, file, staged, *callbacks, curriculum=SequenceCurriculum(96, 4, 4), **settings)[0]

    path, file = tmp_path / "saved.ckpt", tmp_path / "teacher.ckpt"
    shutil.copytree(teacher, file)
    whole = run(tmp_path, file, SaveAt(2 * saved, path))  # clocks 0, 32, 96, 224
    assert len(whole.said) == 6 and {tokens.shape[1] for tokens, _ in whole.said} == {4, 8, 16}
    if saved == 3:
        shutil.rmtree(file)
    resumed = run(tmp_path / "resumed", file, resume=path)
    assert resumed.losses == whole.losses[2 * saved :]
    assert len(resumed.said) == max(0, 6 - 2 * saved)


def test_distillation_resumes_with_the_teacher_it_had(teacher: Path, tmp_path: Path) -> None:
    """Though the teacher's run has a newer checkpoint since; where the old one is gone, the run ends and says so."""
    run, saved = tmp_path / "teacher", tmp_path / "saved.ckpt"
    shutil.copytree(teacher, run / "checkpoints/step-2.ckpt")
    whole, _ = fit(tmp_path, run, SaveAt(4, saved))
    newer = trained(replace(TEACHER, num_layers=2, moe=MoEConfig(2)), tmp_path / "newer")
    shutil.copytree(newer, run / "checkpoints/step-4.ckpt")
    assert fit(tmp_path, run, resume=saved)[0].losses == whole.losses[4:]
    shutil.rmtree(run / "checkpoints/step-2.ckpt")
    with pytest.raises(ValueError, match=r"step-2\.ckpt.*this run has learned from it: restore it"):
        fit(tmp_path, run, resume=saved)
    assert fit(tmp_path, run / "checkpoints/step-4.ckpt", resume=saved)[0].losses != whole.losses[4:]


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has vocab_size=50, the student 61; use a teacher with the student's token"):
        fit(tmp_path, trained(replace(TEACHER, moe=None, vocab_size=50), tmp_path))


def test_distillation_weight_by_the_clock() -> None:
    assert [distillation_weight(clock, 100) for clock in (0, 99, 100, 101)] == [1, 1, 0, 0]
    assert [distillation_weight(clock, 100, 40) for clock in (0, 60, 70, 90, 99, 100)] == [1, 1, 0.75, 0.25, 0.025, 0]
    assert distillation_weight(0, 100, 100) == 1


def test_evaluation_does_not_load_the_teacher(tmp_path: Path) -> None:
    module = MoEGPTModule(STUDENT, distiller=MixtureOfStudents("nowhere"))
    run = trainer(tmp_path, limit_val_batches=1.0)
    assert run.validate(module, SyntheticData(), verbose=False) and run.test(module, SyntheticData(), verbose=False)


def test_teacher_in_fp32_has_its_logits_bit_for_bit_under_bf16(teacher: Path, tmp_path: Path) -> None:
    watch = Watch()
    module = MoEGPTModule(STUDENT, distiller=MixtureOfStudents(str(teacher), precision="fp32"))
    trainer(tmp_path, watch, max_steps=1, precision="bf16-mixed").fit(module, SyntheticData())
    ((tokens, logits),) = watch.said
    alone = dropless(load_model(teacher))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, alone.logits(alone(tokens).hidden))


def test_a_student_keeps_the_top_of_the_pyramid() -> None:
    paper = GPTConfig(50_257, moe=MoEConfig([32] * 10 + [64] * 2, mlp_type="residual"))
    taken = student_layers(paper, 21)
    student = config_of_blocks(paper, taken)
    assert student.moe is not None and student.moe.num_experts == [32] * 8 + [64] * 2
    assert replace(student, num_layers=24, moe=paper.moe) == paper
    theirs, ours = experts_per_layer(paper), experts_per_layer(student)
    assert taken == [*range(4, 24), 22] and [theirs[layer] for layer in taken] == ours
    assert student_layers(paper, 20) == list(range(4, 24))
    assert student_layers(replace(paper, moe=None), 21) == list(range(3, 24))
    mapped = replace(paper, num_layers=6, moe=MoEConfig([0, 8, 0, 8, 0, 16], expert_interval=1))
    assert student_layers(mapped, 4) == [2, 3, 4, 5]
    assert experts_per_layer(config_of_blocks(mapped, [2, 3, 4, 5])) == [0, 8, 0, 16]
    with pytest.raises(ValueError, match=r"num_layers=1 leaves no MoE block of the teacher's num_experts=\[8, 0\]"):
        config_of_blocks(replace(paper, num_layers=2, moe=MoEConfig([8, 0], expert_interval=1)), [1])
    for layers in (0, 24):
        with pytest.raises(ValueError, match=f"num_layers={layers} must be at least 1 and below the teacher's 24"):
            student_layers(paper, layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 1, "tokens": 1}, "step=1, tokens=1, fraction=None; give one of them"),
        ({"fraction": 0.5}, "fraction=0.5 is of model.train_tokens, which is null"),
    ],
)
def test_distillation_refuses_impossible_ends(
    settings: dict[str, Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        fit(tmp_path, teacher, StagedDistillation(**settings))


def test_a_teacher_that_lacks_experts_or_is_not_there_is_refused(tmp_path: Path) -> None:
    module, path = MoEGPTModule(TEACHER), tmp_path / "other.ckpt"
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, SyntheticData())
    module.config = replace(TEACHER, moe=MoEConfig([2, 5], mlp_type="residual"))
    run.save_checkpoint(path)
    with pytest.raises(
        ValueError, match=r"other.ckpt: model entry .*moe\.router\.weight \(saved: \[4, 48\], now: \[5, 48\]\)"
    ):
        fit(tmp_path, path)
    with pytest.raises(ValueError, match=r"model.distiller.teacher=.*nothing.*set it to a trained checkpoint"):
        fit(tmp_path, tmp_path / "nothing")
