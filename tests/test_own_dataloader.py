"""A dataloader that is no `PileDataModule`'s, with an end and a `state_dict` as torchdata's `StatefulDataLoader` has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nlgmoe import MoEGPTModule
from nlgmoe.callbacks import SaveCheckpoints
from nlgmoe.data.sampling import collate
from tests.support.synthetic import Samples
from tests.support.trainers import CONFIG, trainer

BATCHES = 12


class Stateful:
    """As `StatefulDataLoader`, goes on in the next pass where its state is, and then begins anew."""

    def __init__(self) -> None:
        self._samples, self._first, self._taken = Samples(61, 16, 0, 100), 0, 0

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


def fit(folder: Path, resume: Path | None = None) -> int:
    keeper = SaveCheckpoints(every_n_steps=1, keep=100, monitor=None)
    run = trainer(folder, keeper, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=True)
    run.fit(MoEGPTModule(CONFIG), Stateful(), ckpt_path=resume)
    return run.global_step


def test_own_dataloader_resumes_with_what_is_left_of_the_epoch(tmp_path: Path) -> None:
    """But for a micro-batch that the loader had handed out when it was saved, as a line says."""
    assert fit(tmp_path / "whole") == 12
    with pytest.warns(UserWarning, match="goes on at step 4 with data that may repeat, skip or begin again"):
        assert fit(tmp_path / "rest", tmp_path / "whole/checkpoints/step-4.ckpt") in (11, 12)
    assert fit(tmp_path / "end", tmp_path / "whole/checkpoints/step-12.ckpt") == 12
