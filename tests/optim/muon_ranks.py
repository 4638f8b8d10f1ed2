"""A job of `test_muon.py` on ranks."""

from pathlib import Path

from nlgmoe.optim.optimizer import MuonConfig
from tests.support.ranks import Cell, Outcome, on_ranks
from tests.support.trainers import SaveAt

DROPLESS = {"token_dropping": False, "aux_scope": "global"}
CELL = Cell("ddp, Muon", strategy="ddp", moe=DROPLESS, optimizer={"muon": MuonConfig()})


def resumed(alone: Path, folder: Path) -> list[Outcome]:
    """Resume a checkpoint of one process; then train from the start, and resume that from its third step."""
    runs = [on_ranks(CELL, 2, folder / "other", checkpoint=alone)]
    runs.append(on_ranks(CELL, 2, folder / "whole", SaveAt(3, folder / "three.ckpt")))
    return [*runs, on_ranks(CELL, 2, folder / "resumed", checkpoint=folder / "three.ckpt")]
