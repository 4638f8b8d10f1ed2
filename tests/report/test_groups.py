"""Groups of runs by seed: who belongs together, their bands, and paired differences."""

import functools
import json
import math
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from nlgmoe.commands.main import main
from nlgmoe.tools.report.groups import chart, group_runs
from nlgmoe.tools.report.page import page
from nlgmoe.tools.report.runs import read_runs
from nlgmoe.tools.statistics import paired_difference

LOSSES = {"dense": [3.80, 3.90, 3.70], "moe": [3.74, 3.80, 3.68]}


def write(folder: Path, model: str, seed: int, loss: float) -> Path:
    """A run that validated twice."""
    run = folder / f"{model}-{seed}"
    run.mkdir()
    moe = None if model == "dense" else {"num_experts": 8}
    settings = {"model": {"config": {"moe": moe}, "seed": seed}, "data": {"seed": seed}}
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "trainer": {"default_root_dir": str(run)}}))
    (run / "metrics.csv").write_text(f"step,train/loss,val/loss\n0,7,\n4,,{loss + 1}\n9,,{loss}\n")
    (run / "summary.json").write_text(json.dumps({"val_loss": loss}))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write(tmp_path, model, seed, loss) for model, losses in LOSSES.items() for seed, loss in enumerate(losses)]


def test_runs_that_differ_in_their_seeds_are_one_group(runs: list[Path]) -> None:
    groups = group_runs(read_runs(runs), "seed")
    assert [[number for number, _ in group.runs.values()] for group in groups] == [[0, 1, 2], [3, 4, 5]]
    assert [group.name for group in groups] == ["moe=null", "num_experts=8"]
    drawn = chart(groups)
    assert drawn is not None
    low, high, mean = drawn.figure.data[:3]
    assert mean.x == (5, 10) and mean.y == pytest.approx((4.8, 3.8))
    error = 0.1 / math.sqrt(3)
    assert (low.y[1], high.y[1]) == pytest.approx((3.8 - error, 3.8 + error), abs=1e-4)


def test_a_group_without_a_common_validation_is_named(runs: list[Path]) -> None:
    (runs[4] / "metrics.csv").write_text("step,train/loss,val/loss\n0,7,\n6,,4.0\n")
    drawn = chart(group_runs(read_runs(runs), "seed"))
    assert drawn is not None and {line.name for line in drawn.figure.data} == {"moe=null"}
    assert drawn.text.endswith("Not shown, because there is no such step: num_experts=8.")


def test_groups_that_differ_in_much_are_named_by_their_folders(runs: list[Path]) -> None:
    for number, run in enumerate(runs):
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["model"]["config"] |= {f"other_{index}": number // 3 for index in range(4)}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert [group.name for group in group_runs(read_runs(runs), "seed")] == ["dense", "moe"]
    with pytest.raises(ValueError, match=r"group_by=model.config.moe.num_experts: dense-0 has no setting"):
        group_runs(read_runs(runs), "model.config.moe.num_experts")


def test_groups_are_named_by_the_whole_name_of_settings_whose_ends_are_equal(runs: list[Path]) -> None:
    names = [group.name for group in group_runs(read_runs(runs[3:5]), "num_experts")]
    assert names == ["data.seed=0, model.seed=0", "data.seed=1, model.seed=1"]


def test_differences_are_paired_by_seed(runs: list[Path]) -> None:
    text = re.sub(r"<[^>]+>", "|", page(read_runs(runs), "seed"))
    assert "|-0.0600|" in text and "|0.0231|" in text and "|-0.1594 to +0.0394|" in text
    without = re.sub(r"<[^>]+>", "|", page(read_runs([*runs[:2], runs[5]]), "seed"))
    assert "no run with the same value in both" in without
    (runs[5] / "summary.json").unlink()
    text = re.sub(r"<[^>]+>", "|", page(read_runs(runs), "seed"))
    assert "|3 (2 ended)|" in text and "|-0.0800|" in text


def test_a_last_validation_that_is_not_finite_is_no_loss_and_no_earlier_one(runs: list[Path]) -> None:
    (runs[5] / "summary.json").write_text(json.dumps({"val_loss": None}))
    (runs[5] / "metrics.csv").write_text("step,train/loss,val/loss\n0,7,\n4,,4.68\n9,,nan\n")
    found = read_runs(runs)
    assert found[5].last("val/loss") is None and "val/loss is not finite in 1 of 2 rows." in found[5].issues
    text = re.sub(r"<[^>]+>", "|", page(found, "seed"))
    assert "|3 (1 without a finite loss)|" in text and "|3.7700|" in text and "4.680" not in text


def test_losses_of_other_tokens_are_named(runs: list[Path]) -> None:
    assert "Losses per token of these" not in page(read_runs(runs), "seed")
    for run in runs[3:]:
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["data"] |= {"tokenizer": "pocket-1k"}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert (
        "Losses per token of these runs may not be comparable: data.tokenizer differs; compare bits per byte."
        in page(read_runs(runs), "seed")
    )
    for run in runs:
        of_run = yaml.safe_load((run / "config.yaml").read_text())
        of_run["data"] |= {"max_eval_windows": 8}
        (run / "config.yaml").write_text(yaml.safe_dump(of_run))
    assert "bits per byte, best without data.max_eval_windows, which cuts" in page(read_runs(runs), "seed")
    of_run["data"] |= {"corpus": {"class_path": "nlgmoe.data.MegatronIndexed", "init_args": {"prefix": "other"}}}
    (run / "config.yaml").write_text(yaml.safe_dump(of_run))
    assert "comparable: data.tokenizer and data.corpus differ.</p>" in page(read_runs(runs), "seed")


def test_losses_of_other_parts_of_the_text_are_named(runs: list[Path]) -> None:
    known = ["model.config.seq_len", "data.max_eval_windows", "data.micro_batch_size"]
    known += ["trainer.limit_val_batches", "trainer.devices"]

    def note(of_all: dict[str, Any], of_some: dict[str, Any]) -> list[str]:
        for index, run in enumerate(runs):
            settings = yaml.safe_load((run / "config.yaml").read_text())
            for name in known:
                *outer, leaf = name.split(".")
                section = functools.reduce(operator.getitem, outer, settings)
                section[leaf] = (of_all | of_some if index > 2 else of_all).get(name)
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
        return re.findall(r"may not be comparable: (.*?) differs?", page(read_runs(runs), "seed"))

    length, windows = {"model.config.seq_len": 128}, {"data.max_eval_windows": 8}
    assert note({}, length) == [] and note(windows, length) == ["model.config.seq_len"]
    limit, batch = {"trainer.limit_val_batches": 2}, {"data.micro_batch_size": 4}
    assert note({}, {"trainer.limit_val_batches": 1.0}) == [] and note({}, batch) == []
    assert note({}, limit) == ["trainer.limit_val_batches"] and note(limit, batch) == ["data.eval_micro_batch_size"]
    assert note(limit, {"trainer.devices": 2}) == ["trainer.devices"]


def test_a_router_with_a_seed_of_its_own_is_paired_too(runs: list[Path]) -> None:
    for run in runs[3:]:
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["model"]["config"]["moe"]["router"] = {"init_args": {"seed": 7}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    for order in (runs, runs[3:] + runs[:3]):
        text = re.sub(r"<[^>]+>", "|", page(read_runs(order), "seed"))
        assert re.search(r"\|[-+]0.0600\|", text) and "|0.0231|" in text


def test_what_cannot_be_grouped_is_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    output = ["--output", str(tmp_path / "page.html")]
    nowhere = ["--output", str(tmp_path / "nowhere/page.html")]
    for extra, message in (
        (nowhere, f"there is no folder {tmp_path}/nowhere; make it first"),
        (["--group-by", "sead"], "--group-by=sead: dense-0 has no setting whose name ends so"),
        ([str(write(again, "moe", 2, 3.0)), "--group-by", "seed"], "have the same settings and seed; leave one out"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["report", *map(str, runs), *extra, *(output if extra != nowhere else [])])
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_paired_differences_are_scipys() -> None:
    found = paired_difference(*LOSSES.values())
    theirs = stats.ttest_rel(*LOSSES.values())
    assert found.mean / found.error == pytest.approx(theirs.statistic)
    assert found.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.smaller_than(0.2) and not found.smaller_than(0.1)
    assert paired_difference([1.0], [0.5]).interval() == (-math.inf, math.inf)
