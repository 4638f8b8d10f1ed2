"""A trainer's own dataloader, with an end, and with a state of its own as torchdata's `StatefulDataLoader` has."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from nlgmoe import MoEGPTModule
from nlgmoe.data.datamodule import collate
from nlgmoe.resuming.dataloaders import require_whole_epochs
from nlgmoe.validation import SettingError
from tests.checkpoint.runs import SaveAt
from tests.synthetic import _Samples
from tests.test_module import CONFIG, trainer

BATCHES = 12


class Stateful:
    """As `StatefulDataLoader`, goes on in the next pass where its state is, and then begins anew."""

    def __init__(self, samples: int) -> None:
        self._samples, self._first, self._taken, self._of_a_batch = _Samples(61, 16, 0, 100), 0, 0, samples

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first, self._first = self._first % BATCHES, 0
        for self._taken in range(first + 1, BATCHES + 1):
            yield collate(
                [self._samples[self._of_a_batch * self._taken + number] for number in range(self._of_a_batch)]
            )

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["taken"]


def fit(
    *callbacks: Callback, accumulate: int = 2, resume: Path | None = None, samples: int = 2
) -> tuple[int, dict[str, Tensor]]:
    """Two epochs of 6 steps, of 2 micro-batches each; steps and weights at the end."""
    run = trainer(
        Path("unused"), *callbacks, max_epochs=2, accumulate_grad_batches=accumulate, enable_checkpointing=True
    )
    module = MoEGPTModule(CONFIG)
    run.fit(module, Stateful(samples), ckpt_path=resume)
    return run.global_step, dict(module.gpt.named_parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every step; of the end of the first epoch; and of a micro-batch after the second step."""
    folder = tmp_path_factory.mktemp("saved")
    steps = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(folder, "end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    with pytest.warns(
        UserWarning, match="no run can resume: it was saved 1 micro-batches after its last optimizer step"
    ):
        fit(steps, ends, SaveAt(5, folder / "within.ckpt"))
    return folder


@pytest.mark.parametrize("name", ["step=4", "step=8", "end-epoch=0"])
def test_a_run_goes_on_with_what_is_left_of_the_epoch(name: str, saved: Path, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path)
    steps, weights = fit(keeper, resume=saved / f"{name}.ckpt")
    expected, others = fit(keeper)
    assert steps == expected == 12
    assert all(torch.equal(weights[key], value) for key, value in others.items())


@pytest.mark.parametrize(
    ("name", "accumulate", "message"),
    [
        (
            "within",
            2,
            "within.ckpt was saved 1 micro-batches after .* a multiple of accumulate_grad_batches; resume another",
        ),
        ("step=6", 2, "step=6.ckpt was saved at the last step of an epoch, before its end, where the dataloader's own"),
        *(
            (
                "step=4",
                accumulate,
                f"accumulate_grad_batches={accumulate} is not that of the checkpoint's run, in an epoch",
            )
            for accumulate in (1, 3, 4)
        ),
    ],
)
def test_what_would_leave_out_micro_batches_is_refused(
    name: str, accumulate: int, message: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        fit(ModelCheckpoint(tmp_path), accumulate=accumulate, resume=saved / f"{name}.ckpt")


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6 + 12), (3, 6 + 4), (4, 6 + 3)])
def test_steps_may_change_where_an_epoch_ends(accumulate: int, steps: int, saved: Path, tmp_path: Path) -> None:
    found, _ = fit(ModelCheckpoint(tmp_path), accumulate=accumulate, resume=saved / "end-epoch=0.ckpt")
    assert found == steps


CUT, WHOLE = {"limit_train_batches": 4}, {"limit_train_batches": BATCHES}


@pytest.mark.parametrize(
    ("first", "then", "goes_on"),
    [
        (CUT | {"max_epochs": 3}, CUT | {"max_epochs": 3}, True),
        (WHOLE | {"max_steps": 30}, WHOLE | {"max_steps": 30}, True),
        (WHOLE | {"max_steps": 13}, CUT | {"max_steps": 14}, True),
        (CUT | {"max_steps": 10}, CUT | {"max_steps": 10}, False),
        (CUT | {"max_steps": 10}, WHOLE | {"max_steps": 30}, False),
        (CUT | {"max_steps": 10, "max_epochs": 3}, CUT | {"max_steps": 10, "max_epochs": 3}, False),
    ],
    ids=str,
)
def test_the_next_epoch_begins_anew_or_is_refused(
    first: dict[str, int], then: dict[str, int], goes_on: bool, tmp_path: Path
) -> None:
    """Where `max_steps` ends a run, Lightning goes back to the dataloader's state at an epoch's end too."""

    class Fed(Callback):
        def __init__(self) -> None:
            self.batches: list[list[int]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.batches.append(batch["tokens"].tolist())  # the first of an epoch

    def run(settings: dict[str, int], folder: Path, resume: Path | None = None) -> list[list[int]]:
        fed, ends = Fed(), ModelCheckpoint(folder, "end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
        one = trainer(tmp_path, fed, ends, enable_checkpointing=True, **settings)
        one.fit(MoEGPTModule(CONFIG), Stateful(2), ckpt_path=resume)
        return fed.batches

    begun, saved = run(first, tmp_path / "first"), tmp_path / "first" / "end-epoch=0.ckpt"
    if goes_on:
        assert begun[0] == run(then, tmp_path / "then", saved)[0]
    else:
        with pytest.raises(
            SettingError, match=r"end-epoch=0.ckpt is of the end of an epoch of 4 batches, .* set max_epochs"
        ):
            run(then, tmp_path / "then", saved)


def test_a_run_at_its_last_epochs_end_ends(tmp_path: Path) -> None:
    """A step's checkpoint, which is saved before the epoch ends."""
    for resume in (None, tmp_path / "step=4.ckpt"):
        steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(tmp_path, steps, enable_checkpointing=True, **CUT | {"max_epochs": 1, "max_steps": 100})
        run.fit(MoEGPTModule(CONFIG), Stateful(2), ckpt_path=resume)
        assert run.global_step == 4


@pytest.mark.parametrize("accumulate", [2, 5])
def test_a_run_at_its_end_takes_no_step(accumulate: int, saved: Path, tmp_path: Path) -> None:
    assert fit(ModelCheckpoint(tmp_path), accumulate=accumulate, resume=saved / "step=12.ckpt")[0] == 12


@pytest.mark.parametrize(("accumulate", "warned"), [(5, False), (12, True)])
def test_a_warning_of_another_batch_leaves_out_the_smaller_last_step(
    accumulate: int, warned: bool, tmp_path: Path
) -> None:
    """With 12 micro-batches a step, an epoch is one step, and the batch is another one in fact."""
    ends = ModelCheckpoint(tmp_path, "end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    fit(ends, accumulate=accumulate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ends, accumulate=accumulate, resume=tmp_path / "end-epoch=0.ckpt", samples=1 if warned else 2)
    assert any("a step had 24 sequences when" in str(one.message) for one in caught) == warned
    assert any("a step had" in str(one.message) for one in caught) == warned


def test_deepspeed_counts_steps_of_whole_epochs_only() -> None:
    def check(batches: float, accumulate: int, max_steps: int = -1, max_epochs: int | None = None) -> None:
        counts = {"num_training_batches": batches, "accumulate_grad_batches": accumulate, "max_steps": max_steps}
        counts |= {"max_epochs": max_epochs, "current_epoch": 2}
        run: Any = SimpleNamespace(**counts, strategy=SimpleNamespace(handles_gradient_accumulation=True))
        require_whole_epochs(run, other_steps=False, of_dataloader=None)

    check(12, 3)
    check(math.inf, 5)
    check(10, 3, max_steps=3)  # ends within the first epoch
    check(10, 3, max_epochs=3)
    check(10, 3, max_epochs=2)  # at its end
    for more in ({"max_steps": 4}, {"max_epochs": 4}, {"max_epochs": -1}):
        with pytest.raises(SettingError, match=r"=3 does not divide an epoch's 10 .*; set limit_train_batches=9$"):
            check(10, 3, **more)
    with pytest.raises(SettingError, match=r"set it lower$"):
        check(2, 3)
