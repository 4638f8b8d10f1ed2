"""A dataloader that is no `PileDataModule`'s, with an end and a `state_dict` as torchdata's `StatefulDataLoader` has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nlgmoe import MoEGPTModule
from nlgmoe.callbacks import SaveCheckpoints
from nlgmoe.data.sampling import collate
from tests.synthetic import _Samples
from tests.test_module import CONFIG, trainer

BATCHES = 12


class Stateful:
    """As `StatefulDataLoader`, goes on in the next pass where its state is, and then begins anew."""

    def __init__(self) -> None:
        self._samples, self._first, self._taken = _Samples(61, 16, 0, 100), 0, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first, self._first = self._first % BATCHES, 0
        for self._taken in range(first + 1, BATCHES + 1):
            yield collate([self._samples[2 * self._taken + number] for number in range(2)])

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["taken"]


def fit(folder: Path, resume: Path | None = None) -> tuple[int, dict[str, Tensor]]:
    """Two epochs of 6 steps, of 2 micro-batches each; steps and weights at the end."""
    keeper = SaveCheckpoints(every_n_steps=1, keep=100, monitor=None)
    run = trainer(folder, keeper, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=True)
    module = MoEGPTModule(CONFIG)
    run.fit(module, Stateful(), ckpt_path=resume)
    return run.global_step, dict(module.gpt.named_parameters())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The run folder of an undisturbed run, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    steps, weights = fit(folder)
    assert steps == 12
    return folder, weights


def test_a_run_goes_on_with_what_is_left_of_the_epoch(whole: Any, tmp_path: Path) -> None:
    """But for a micro-batch that the loader had handed out when it was saved, as a line says."""
    with pytest.warns(UserWarning, match="goes on at step 4 from the state_dict of its own dataloader, which may"):
        steps, _ = fit(tmp_path, whole[0] / "checkpoints/step-4.ckpt")
    assert 11 <= steps <= 12


def test_a_run_at_its_end_takes_no_step(whole: Any, tmp_path: Path) -> None:
    folder, expected = whole
    steps, weights = fit(tmp_path / "end", folder / "checkpoints/step-12.ckpt")
    assert steps == 12
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
