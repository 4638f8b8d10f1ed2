"""Two ranks in seconds: the parts of `ranks/` that a change of exchange, gradients or clocks breaks first."""

from pathlib import Path

import pytest

from tests.support.cells import CAPACITY, DROPLESS
from tests.support.ranks import Cell, Outcome, alone, assert_close, train_all
from tests.support.spawn import spawn

GROUPS = {"top_k": 2, "second_expert": "argmax", "groups": [2, 1], "mlp_type": "residual", "residual_mix": "sigmoid"}
CELLS = [
    Cell("two ranks, dropless, ZeRO 1", 2, 1, moe=DROPLESS | {"mlp_type": "residual"}, accumulate=2, padded=True),
    Cell("two ranks, capacity, ZeRO 2", 2, 2, moe=CAPACITY),
    Cell("two ranks, groups, gated shared expert", 2, 2, moe=DROPLESS | GROUPS),
    Cell("two ranks, rates by component", 2, 2, moe=DROPLESS, optimizer={"lr_scale": {"router": 0.25, "experts": 4.0}}),
    Cell("two ranks, nothing but defaults", 2, 2, moe={}),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder = tmp_path_factory.mktemp("ranks")
    by_rank = spawn(2, train_all, CELLS, 2, folder, folder=folder)
    return {cell.name: [rank[index] for rank in by_rank] for index, cell in enumerate(CELLS)}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_ranks_have_the_losses_gradients_and_norms_of_one_process(
    cell: Cell, outcomes: dict[str, list[Outcome]], tmp_path: Path
) -> None:
    expected, ranks = alone(cell, 2, tmp_path), outcomes[cell.name]
    for rank in ranks:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-5)
        assert rank.validation == pytest.approx(expected.validation, rel=1e-5)
        assert rank.clip_norms == pytest.approx(expected.norms, rel=1e-3)
        assert rank.clip_norms[0] == pytest.approx(expected.norms[0], rel=1e-5)
        for name in ("train/tokens", "train/grad_norm", "train/grad_norm_dense", "experts/0/grad_norm_experts"):
            assert rank.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-3), name
    assert_close({name: value for rank in ranks for name, value in rank.gradients.items()}, expected.gradients, 1e-5)
