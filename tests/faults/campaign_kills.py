"""Thirty kills, half of them on two ranks. FAULTS_SEED draws others."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.harness import Run
from tests.faults.kills import campaign
from tests.faults.results import Results

KILLS = 15
SEED = int(os.environ.get("FAULTS_SEED", "0"))


@pytest.mark.parametrize(("ranks", "fixture"), [(1, "undisturbed"), (2, "undisturbed_ranks")])
def test_killed_runs_end_where_the_undisturbed_one_does(
    ranks: int, fixture: str, tmp_path: Path, results: Results, request: pytest.FixtureRequest
) -> None:
    undisturbed = request.getfixturevalue(fixture)
    assert isinstance(undisturbed, Run)
    print(f"\n{KILLS} kills, {ranks} ranks, seed {SEED}", flush=True)
    kills, finished = campaign(tmp_path, undisturbed, KILLS, SEED)
    assert sum(".writing" in kill.happened for kill in kills) >= KILLS // 3
    half_written = [kill for kill in kills if any(".writing-" in name for name in kill.leftovers)]
    assert len(half_written) >= KILLS // 5, "the kills come too late: too few hit a checkpoint that was being written"
    losses = {name: undisturbed.summary()[name] for name in ("train_loss", "val_loss")}
    results.add(
        f"kills, ranks: {ranks}",
        {
            "seed": SEED,
            "undisturbed": losses,
            "runs": [asdict(run) for run in finished],
            "kills": [asdict(kill) for kill in kills],
        },
    )
