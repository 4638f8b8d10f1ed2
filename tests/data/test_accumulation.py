"""The global batch: one setting, the same batch on any number of ranks and with any micro-batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest

from nlgmoe import GPTConfig, MoEGPTModule, PileDataModule
from nlgmoe.data.accumulation import micro_batches_per_step
from nlgmoe.validation import SettingError

Make = Callable[..., PileDataModule]


@pytest.mark.parametrize(("sizes", "count"), [((256, 4, 64), 1), ((512, 2, 64), 4), ((256, 4, 1), 64), ((8, 8, 1), 1)])
def test_micro_batches_per_step(sizes: tuple[int, int, int], count: int) -> None:
    assert micro_batches_per_step(*sizes) == count


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((256, 4, 128), r"512 sequences that 128 ranks feed .* set data.global_batch_size to 512, or another size$"),
        ((10, 4, 1), r"1 rank feeds .* data.global_batch_size to 8 or 12, or another size$"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro_batches_per_step(*sizes)


class Steps(lightning.Callback):
    """Records after which micro-batch of the fit a step was taken, and when validation ran."""

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
    module = MoEGPTModule(GPTConfig(400, 32, 1, 16, 2))
    defaults = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=max_steps,
        callbacks=[steps],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **{**defaults, "limit_val_batches": 0, **options},
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "end.ckpt")
    return steps


def test_a_step_takes_the_micro_batches_of_the_global_batch(make_data: Make, tmp_path: Path) -> None:
    """Validation comes every so many steps, whatever a step is made of; so it does when the run is resumed with another."""
    data = make_data(micro_batch_size=4, global_batch_size=12, max_eval_windows=1)
    interval = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    first = fit(tmp_path, data, 3, **interval)
    assert first.steps == [0, 3, 6, 9] and first.validated == [2, 3]  # and at the end
    assert data.samples_consumed == 36

    resumed = make_data(micro_batch_size=2, global_batch_size=12, max_eval_windows=1)
    second = fit(tmp_path, resumed, 6, tmp_path / "end.ckpt", **interval)
    assert second.steps == [0, 6, 12, 18] and second.validated == [4, 6]
    assert resumed.samples_consumed == 72


def test_accumulation_has_one_master(make_data: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"accumulate_grad_batches 2 and data.global_batch_size 12 .* makes it 3"):
        fit(tmp_path, make_data(global_batch_size=12), 1, accumulate_grad_batches=2)
    assert fit(tmp_path, make_data(), 2, accumulate_grad_batches=2).steps == [0, 2, 4]
