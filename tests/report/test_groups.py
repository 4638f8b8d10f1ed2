"""Groups of runs by seed: membership, means and bands, paired differences at the end."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from nlgmoe.tools.report.groups import chart, group_runs, paired_difference, table
from nlgmoe.tools.report.page import page
from nlgmoe.tools.report.runs import read_runs

LOSSES = {"dense": [3.80, 3.90, 3.70], "moe": [3.74, 3.80, 3.68]}


def write(folder: Path, model: str, seed: int, loss: float) -> Path:
    """A run that validated twice; a step of the MoE has half the FLOPs."""
    run = folder / f"{model}-{seed}"
    run.mkdir()
    moe = None if model == "dense" else {"num_experts": 8}
    settings = {"model": {"config": {"moe": moe}, "seed": seed}, "data": {"seed": seed}}
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "trainer": {"default_root_dir": str(run)}}))
    flops = 2000 if model == "dense" else 1000
    rows = f"0,7,{flops},\n4,,,{loss + 1}\n9,6,{10 * flops},{loss}\n"
    (run / "metrics.csv").write_text(f"step,train/loss,train/flops,val/loss\n{rows}")
    facts = {"val_loss": loss, "params_total": 3_000_000, "params_active": 1_000_000, "tokens_per_second": 100.0 * seed}
    (run / "summary.json").write_text(json.dumps(facts))
    return run


def change(run: Path, section: str, **settings: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section] |= settings
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def shown(html: str) -> str:
    return re.sub(r"(<[^>]+>)+", "|", html)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write(tmp_path, model, seed, loss) for model, losses in LOSSES.items() for seed, loss in enumerate(losses)]


def test_group_has_the_runs_that_differ_in_their_seeds(runs: list[Path]) -> None:
    for run in runs:
        change(run, "trainer", logger={"class_path": "WandbLogger", "init_args": {"name": run.name}})
    groups = group_runs(read_runs(runs), "seed")
    names = [[f"{model}-{seed}" for seed in range(3)] for model in ("dense", "moe")]
    assert [[run.name for run in group.runs.values()] for group in groups] == names
    assert [group.mean.name for group in groups] == ["moe=null", "num_experts=8"]
    colours = [curve.colour for group in groups for curve in (group.mean, *group.runs.values())]
    assert len(set(colours)) == 8
    drawn = chart(groups)
    assert drawn is not None
    low, high, mean = drawn.panels[0].traces[:3]
    assert mean["x"] == [5, 10] and mean["y"] == pytest.approx([4.8, 3.8])
    error = 0.1 / math.sqrt(3)
    assert (low["y"][1], high["y"][1]) == pytest.approx((3.8 - error, 3.8 + error), abs=1e-4)


def test_differences_are_paired_by_seed(runs: list[Path]) -> None:
    groups = group_runs(read_runs(runs), "seed")
    text = shown(table(groups))
    assert "|at the end: minus moe=null|–|-0.0600|" in text and "|at the end: standard error|–|0.0231|" in text
    assert "|at the end: 95% interval|–|-0.1594 to +0.0394|" in text and "|at the end: verdict|–|unresolved|" in text
    assert "|parameters|3.00M|3.00M|" in text and "|parameters active for a token|1.00M|1.00M|" in text
    assert "|FLOPs of a run|20.00k|10.00k|" in text and "|tokens/s|100|100|" in text
    assert "|at the end: minus num_experts=8|+0.0600|–|" in shown(table(groups, reference=1))
    assert "no pairs: no setting has the same value in a run of both" in page(read_runs([*runs[:2], runs[5]]), "seed")
    (runs[5] / "summary.json").unlink()
    text = shown(page(read_runs(runs), "seed"))
    assert "|3 (2 ended)|" in text and "|-0.0800|" in text
    for run, loss in zip(runs[3:], (3.70, 3.81, 3.59), strict=True):
        (run / "summary.json").write_text(json.dumps({"val_loss": loss}))
    groups = group_runs(read_runs(runs), "seed")
    assert "|at the end: verdict|–|lower|" in shown(table(groups))  # the interval is on one side of zero
    assert "|at the end: verdict|higher|–|" in shown(table(groups, reference=1))


def test_last_validation_that_is_not_finite_gives_no_loss_and_no_earlier_one(runs: list[Path]) -> None:
    (runs[5] / "summary.json").write_text(json.dumps({"val_loss": None}))
    (runs[5] / "metrics.csv").write_text("step,train/loss,val/loss\n0,7,\n4,,4.68\n9,,nan\n")
    read = read_runs(runs)
    assert read[5].last("val/loss") is None and "val/loss is not finite in 1 of 2 rows." in read[5].notes
    text = shown(page(read, "seed"))
    assert "|3 (1 without a finite loss)|" in text and "|3.7700|" in text and "4.680" not in text


def test_paired_differences_are_scipys() -> None:
    difference = paired_difference(*LOSSES.values())
    theirs = stats.ttest_rel(*LOSSES.values())
    assert difference.mean / difference.error == pytest.approx(theirs.statistic)
    assert difference.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert difference.interval(0.9) == pytest.approx(tuple(theirs.confidence_interval(0.9)))
    assert paired_difference([1.0], [0.5]).interval() == (-math.inf, math.inf)
