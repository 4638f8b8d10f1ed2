"""The global batch: the same on any number of ranks and with any micro-batch, constant or growing."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest

from nlgmoe import GPTConfig, MoEGPTModule, PileDataModule
from nlgmoe.data.sampling import BatchRampUp, batch_size_after, micro_batches_per_step
from nlgmoe.validation import SettingError
from tests.support.corpora import batches, rows
from tests.support.trainers import trainer as quiet_trainer

Make = Callable[..., PileDataModule]
# 12 sequences in the end, 4 at first, 4 more every 16 sequences of 32 tokens.
RAMP_UP = BatchRampUp(start=4, increment=4, tokens=2 * 16 * 32)
SIZES = [4, 4, 4, 4, 8, 8, 12, 12]


def test_micro_batches_per_step() -> None:
    sizes = [(256, 4, 64), (512, 2, 64), (256, 4, 1), (8, 8, 1)]
    assert [micro_batches_per_step(*three) for three in sizes] == [1, 4, 64, 1]
    with pytest.raises(SettingError, match=r"1 rank feeds .*; change one of them$"):
        micro_batches_per_step(10, 4, 1)
    with pytest.raises(
        SettingError,
        match=r"^start=4 does not grow to global_batch_size=12 by increment=4; make start and increment multiples of 6",
    ):
        PileDataModule(global_batch_size=12, batch_ramp_up=RAMP_UP, micro_batch_size=2)


def test_ramp_up_is_the_published_one_of_1_3b() -> None:
    """--rampup-batch-size 32 32 1953125 --global-batch-size 512: 15 increments, one every 130,208.33 samples."""
    ramp_up = BatchRampUp(32, 32, 1_953_125 * 2048)
    sizes = {0: 32, 130_208: 32, 130_209: 64, 976_562: 256, 976_563: 256}
    sizes |= {1_041_667: 288, 1_953_124: 480, 1_953_125: 512}
    assert {samples: batch_size_after(samples, 2048, 512, ramp_up) for samples in sizes} == sizes
    assert batch_size_after(0, 2048, 512, None) == batch_size_after(10**9, 2048, 512, ramp_up) == 512


def steps(data: PileDataModule, micro_batches: int, count: int, world_size: int) -> list[list[list[int]]]:
    """The rows of each of the next `count` steps, in the order of their samples."""
    by_rank = [batches(data, count * micro_batches, rank, world_size) for rank in range(world_size)]
    return [
        [row for index in range(micro_batches) for rank in by_rank for row in rows(rank[step * micro_batches + index])]
        for step in range(count)
    ]


@pytest.mark.parametrize(("micro_batch_size", "world_size", "micro_batches"), [(12, 1, 1), (3, 2, 2)])
def test_ramp_up_has_the_same_samples_on_any_ranks_and_resumes_in_its_middle(
    make_data: Make, micro_batch_size: int, world_size: int, micro_batches: int
) -> None:
    straight = [row for batch in batches(make_data(micro_batch_size=1), sum(SIZES)) for row in rows(batch)]
    options = {"micro_batch_size": micro_batch_size, "global_batch_size": 12, "batch_ramp_up": RAMP_UP}
    whole = steps(make_data(**options), micro_batches, len(SIZES), world_size)
    assert [len(step) for step in whole] == SIZES and [row for step in whole for row in step] == straight

    killed = make_data(**options, num_workers=1)
    batches(killed, 9)  # workers have loaded ahead
    for size in SIZES[:5]:
        assert killed.batch_size_after(killed.samples_consumed) == size
        killed.advance(size)
    resumed = make_data(**options | {"micro_batch_size": 3})
    resumed.load_state_dict(killed.state_dict())
    assert steps(resumed, 2, 3, 2) == whole[5:]


class Steps(lightning.Callback):
    def __init__(self) -> None:
        self.micro_batches, self.steps, self.validated = 0, [0], []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.micro_batches += 1
        if trainer.global_step > len(self.steps) - 1 + self.first:
            self.steps.append(self.micro_batches)

    def on_train_start(self, trainer: lightning.Trainer, _: Any) -> None:
        self.first = trainer.global_step

    def on_validation_start(self, trainer: lightning.Trainer, _: Any) -> None:
        self.validated.append(trainer.global_step)


def fit(folder: Path, data: PileDataModule, max_steps: int, checkpoint: Path | None = None, **options: Any) -> Steps:
    steps = Steps()
    trainer = quiet_trainer(folder, steps, max_steps=max_steps, **options)
    trainer.fit(MoEGPTModule(GPTConfig(400, 32, 1, 16, 2)), data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "end.ckpt")
    return steps


def test_accumulation_takes_a_steps_micro_batches_and_the_clocks_follow(make_data: Make, tmp_path: Path) -> None:
    """Six steps, saved, and two more with smaller micro-batches: validation and clocks count steps and samples."""
    options: dict[str, Any] = {"global_batch_size": 12, "batch_ramp_up": RAMP_UP, "max_eval_windows": 1}
    interval = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a step had .* sequences")
        data = make_data(micro_batch_size=6, **options)
        first = fit(tmp_path, data, 6, **interval)
        assert first.steps == [0, 2, 4, 6, 8, 10, 12] and first.validated == [2, 4, 6]
        assert data.samples_consumed == sum(SIZES[:6])
        resumed = make_data(micro_batch_size=3, **options)
        second = fit(tmp_path, resumed, 8, tmp_path / "end.ckpt", **interval)
        assert second.steps == [0, 4, 8] and second.validated == [8]
    assert resumed.samples_consumed == sum(SIZES)
    assert resumed.trainer.lightning_module.tokens_seen == sum(SIZES) * 32  # type: ignore[union-attr]
    with pytest.warns(
        UserWarning, match="a step had 12 sequences .*, now it has 4; data.global_batch_size and data.bat"
    ):
        fit(tmp_path, make_data(micro_batch_size=4, global_batch_size=4), 9, tmp_path / "end.ckpt")


def test_accumulation_set_by_trainer_and_data_must_agree(make_data: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"accumulate_grad_batches=2 and data.global_batch_size=12 .* makes it 3"):
        fit(tmp_path, make_data(global_batch_size=12), 1, accumulate_grad_batches=2)
    data = make_data()
    assert fit(tmp_path, data, 2, accumulate_grad_batches=2).steps == [0, 2, 4] and data.batch_size_after(0) == 8
