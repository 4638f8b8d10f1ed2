"""The same numbers on 1, 2, 3 or 4 ranks, at every expert-parallel degree and ZeRO stage.

Parity means: dropless, global statistics, no noise: N ranks equal one process with the whole batch. Where ranks route for
themselves (capacity, `aux_scope: rank`): N ranks equal one process that accumulates the N micro-batches.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.cells import Cell, Outcome, alone, run_all, spawn

DROPLESS = {"token_dropping": False}
CAPACITY = {"aux_scope": "rank", "train_capacity_factor": 1.0, "min_capacity": 1}
PYRAMID = [2, 4, 8]

CELLS: dict[int, list[Cell]] = {
    1: [Cell("one rank")],
    2: [
        *(Cell(f"degree {degree}, ZeRO {stage}", degree, stage) for degree in (1, 2) for stage in (0, 1, 2)),
        Cell("capacity", 2, moe=CAPACITY),
        # Few steps: a sampled second expert is decided by less than rounding once in some 100,000 choices.
        Cell("capacity, ZeRO 0, sampled top-2, accumulation", 2, 0, moe=CAPACITY | {"top_k": 2}, accumulate=2, steps=5),
        Cell("accumulation, residual", 2, moe=DROPLESS | {"mlp_type": "residual"}, accumulate=2),
        Cell(
            "activation checkpointing, top-2",
            2,
            1,
            moe=DROPLESS | {"top_k": 2, "second_expert": "argmax"},
            checkpointing=True,
        ),
        Cell("uneven masks", 2, moe=DROPLESS | {"z_loss_coeff": 0.01}, padded=True),
        Cell("statistics of each rank", 2, moe=DROPLESS | {"aux_scope": "rank"}),
        Cell("offload", 2, options={"offload_optimizer": True}),
        Cell("ddp", strategy="ddp", moe=DROPLESS | {"mlp_type": "residual"}),
    ],
    3: [Cell("six experts", 3, experts=6), Cell("4 and 6 experts", 3, 1, experts=[4, 6])],
    4: [
        Cell("degree 2", 2),
        Cell("degree 4", 4, 1),
        Cell("pyramid", 4, 2, experts=PYRAMID, layers=6, moe=DROPLESS | {"mlp_type": "residual"}),
        Cell("pyramid, ZeRO 0, capacity", 4, 0, experts=PYRAMID, layers=6, moe=CAPACITY, accumulate=2),
    ],
}
WHERE = {cell.name: ranks for ranks, cells in CELLS.items() for cell in cells}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Of every cell, by rank."""
    found: dict[str, list[Outcome]] = {}
    for ranks, cells in CELLS.items():
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        results = spawn(ranks, run_all, cells, ranks, folder, folder=folder)
        found |= {cell.name: [result[cell.name] for result in results] for cell in cells}
    return found


@pytest.mark.parametrize("cell", [cell for cells in CELLS.values() for cell in cells], ids=lambda cell: cell.name)
def test_ranks_compute_what_one_process_computes(
    cell: Cell, outcomes: dict[str, list[Outcome]], tmp_path: Path
) -> None:
    expected, found = alone(cell, WHERE[cell.name], tmp_path), outcomes[cell.name]
    norms = [sum(squares.values()) ** 0.5 for squares in expected.squares]
    assert min(norms) > cell.clip
    for outcome in found:
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.validation == pytest.approx(expected.validation, rel=1e-5)
        assert outcome.clip_norms == pytest.approx(norms if cell.strategy == "expert_parallel" else [], rel=1e-5)
    gradients = {name: value for outcome in found for name, value in outcome.gradients.items()}
    assert gradients.keys() == expected.gradients.keys()
    total = torch.stack([value.norm() for value in expected.gradients.values()]).norm()
    for name, value in expected.gradients.items():
        error = (gradients[name] - value).norm()
        assert error <= 1e-5 * max(value.norm(), 1e-3 * total), f"{name}: {error / value.norm():.1e} of its norm"
