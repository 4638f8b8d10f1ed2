"""Nightly: 8 and 16 ranks against one process, and what they save, resumed on 1, 4 and 6."""

from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from tests.support.cells import CAPACITY, DROPLESS
from tests.support.jobs import assert_equal, saves_at_start
from tests.support.ranks import Cell, Outcome, train
from tests.support.spawn import spawn
from tests.support.trainers import SaveAt

SAMPLES, SAVED = 48, 3  # divisible by all numbers of ranks; the step that is saved
EIGHT = {"experts": [8, 16]}
CELLS = [
    Cell("degree 8, ZeRO 1, dropless", 8, 1, moe=DROPLESS, accumulate=2, **EIGHT),
    Cell("degree 4, ZeRO 2, top-2", 4, 2, moe=DROPLESS | {"top_k": 2, "second_expert": "argmax"}, **EIGHT),
    Cell("degree 8, ZeRO 2, capacity, recomputed", 8, 2, moe=CAPACITY, checkpointing=True, **EIGHT),
    Cell("degree 1, ZeRO 1, residual", 1, 1, moe=DROPLESS | {"mlp_type": "residual"}, **EIGHT),
]


def on_many(ranks: int, folder: Path, checkpoints: Path | None = None) -> list[Outcome]:
    """Every cell on this rank; from its checkpoint, which is saved again, or else saved after `SAVED` steps."""
    outcomes = []
    for cell in CELLS if checkpoints is None else CELLS[:2]:
        path = None if checkpoints is None else checkpoints / f"{cell.name}.ckpt"
        at = SaveAt(SAVED * cell.accumulate, folder / f"{cell.name}.ckpt")
        saves: Callback = at if path is None else saves_at_start(folder / f"{cell.name}.ckpt")
        few = replace(cell, degree=min(cell.degree, ranks))
        outcomes.append(train(few, ranks, folder, SAMPLES // ranks, cell.accumulate, saves, checkpoint=path))
    return outcomes


@pytest.mark.parametrize("ranks", [8, 16])
def test_many_ranks_compute_what_one_process_does_and_others_resume_it(ranks: int, tmp_path: Path) -> None:
    by_rank = spawn(ranks, on_many, ranks, tmp_path / "many", folder=tmp_path / "many")
    for index, cell in enumerate(CELLS):
        times = ranks if cell.rank_local else 1
        folder = tmp_path / "alone"
        expected = train(cell, 1, folder, SAMPLES // times, cell.accumulate * times)
        for outcomes in by_rank:
            assert outcomes[index].losses == pytest.approx(expected.losses, rel=1e-5), cell.name
            assert outcomes[index].clip_norms == pytest.approx(expected.norms, rel=1e-3), cell.name
            assert outcomes[index].validation == pytest.approx(expected.validation, rel=1e-5), cell.name
    for fewer in (1, 4, 6):
        folder = tmp_path / str(fewer)
        resumed = spawn(fewer, on_many, fewer, folder, tmp_path / "many", folder=folder)
        for index, cell in enumerate(CELLS[:2]):
            assert_equal(folder / f"{cell.name}.ckpt", tmp_path / "many" / f"{cell.name}.ckpt")
            for outcomes in resumed:
                losses = by_rank[0][index].losses[SAVED:]
                assert outcomes[index].losses == pytest.approx(losses, rel=1e-5), (cell.name, fewer)
