"""`make reproduce` at its smallest, and its readings of losses that were made up."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from benchmarks.documents import with_text
from benchmarks.gate import carry
from benchmarks.gate import page as gate
from benchmarks.reproduce.__main__ import RESULTS
from benchmarks.reproduce.__main__ import main as reproduce
from benchmarks.reproduce.campaign import Campaign, best_rate
from benchmarks.reproduce.cells import GROWTH, WIDER, Cell
from benchmarks.reproduce.questions import AGREES, DIFFERS, LARGER, QUESTIONS, UNRESOLVED, readings, runs_of
from benchmarks.reproduce.readings import MISSING, answers, cost_at_equal_loss
from benchmarks.reproduce.scale import CONFIGS, CPU, TINY
from benchmarks.reproduce.tables import (
    BEGIN,
    END,
    FIGURES,
    PAGE,
    long_table,
    page_of_models,
    write,
)
from nlgmoe.model.counting import count_parameters
from nlgmoe.tools.report.groups import PairedDifference
from nlgmoe.validation import RunError
from tests.support.in_process import Here

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_campaign_resumes_trunks_and_logits_and_repeats_no_run(pocket_pile: Path, tmp_path: Path) -> None:
    results, here = tmp_path / "results.json", Here()

    def campaign(commit: str = "abc") -> Campaign:
        made = Campaign(tmp_path / "runs", results, commit, ROOT, TINY, here)
        made.results["learning_rates"] = dict.fromkeys(("dense", "moe_8", "moe_32", "dense_4x"), 1e-2)
        return made

    students = [Cell("student", 1.0, "full"), Cell("student", 0.25, "full"), Cell("student", 0.5, "staged")]
    runs = [(cell, 1) for cell in [Cell("pr_moe"), Cell("dense"), Cell("dense", 0.5), *students]]
    with pytest.raises(RunError, match="pr_moe@1-seed1 ended with exit code 137: killed"):
        campaign().train(runs, 1)
    campaign().train(runs, 1)
    found = json.loads(results.read_text())["runs"]
    assert [run["tokens"] for run in found.values()] == [640, 640, 320, 640, 160, 320]
    assert all(run["val_loss"] > 0 and run["seed"] == 1 for run in found.values())
    starts = [command[-1].partition("=")[2] for command in here.commands if command[0] == "train.py"]
    assert [Path(start).name for start in starts] == ["auto"] * 3 + ["step-4.ckpt", "auto", "auto", "step-8.ckpt"]
    assert sum("distill-logits" in command for command in here.commands) == 1
    campaign().train(runs, 1)
    assert len(here.commands) == 8 and campaign()._recording(1).has_ended
    (position := tmp_path / "runs/logits-seed1/position.json").touch()
    assert not campaign()._recording(1).has_ended  # it was stopped
    position.unlink()
    with pytest.raises(ValueError, match="has commit abc, this is def: runs of both are no pairs"):
        campaign("def")
    # In a new folder the trunk of a missing run is trained again.
    shutil.rmtree(tmp_path / "runs")
    again = json.loads(results.read_text())
    del again["runs"]["dense@0.5-seed1"]
    results.write_text(json.dumps(again))
    campaign().train(runs, 1)
    repeated = json.loads(results.read_text())["runs"]
    assert [repeated[name]["val_loss"] for name in found] == [run["val_loss"] for run in found.values()]
    assert len(here.commands) == 10


def test_campaign_files_are_models_of_the_intended_size(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, tmp_path / "results.json", "abc", ROOT, CPU)
    names = {path.stem for path in (ROOT / CONFIGS).glob("*.yaml")} - {"base"}
    assert names == {cell.config for cell, _ in runs_of((*QUESTIONS, *LARGER))} | {"moe_8", "top_2"}
    active = {name: count_parameters(campaign.shape(name)).active for name in names}
    assert all(0.24e6 < active[name] < 0.25e6 for name in GROWTH)
    tokens = CPU.steps * CPU.step_tokens
    assert tokens / active["moe_16"] == pytest.approx(20, rel=0.03)
    pyramid, standard = (count_parameters(campaign.shape(name)).total for name in ("pr_moe", "moe_32"))
    assert 2 < standard / pyramid < 3
    assert all(active[cell.config] == pytest.approx(2 * active[cell.config.removesuffix("_2x")], rel=0.1)
               for cell in {cell for question in LARGER for cell in (question.first, question.second)})  # fmt: skip


def test_campaign_model_is_that_of_the_code_that_trains(tmp_path: Path) -> None:
    shutil.copytree(ROOT / CONFIGS, tmp_path / CONFIGS)
    file = tmp_path / CONFIGS / "moe_16.yaml"
    file.write_text(file.read_text().replace("num_experts: 16", "num_experts: 2"))
    campaign = Campaign(tmp_path / "runs", tmp_path / "results.json", "abc", tmp_path, CPU)
    assert campaign.shape("moe_16").moe.num_experts == 2


def test_campaign_refuses_a_folder_of_another_commit_or_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.json"
    results.write_text('{"commit": "0123456789abc"}')
    (tmp_path / "code-9876543210").mkdir()
    arguments = ["reproduce", f"--out={tmp_path}", f"--results={results}"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="has runs of code-9876543210, not of code-0123456789; name another --out"):
        reproduce()
    with FileLock(tmp_path / ".lock"), pytest.raises(SystemExit, match="another process works in"):
        reproduce()


def test_campaign_puts_a_run_after_those_that_it_goes_on_from() -> None:
    runs = runs_of(QUESTIONS)
    assert len(set(runs)) == len(runs)
    for place, (cell, seed) in enumerate(runs):
        needed = [cell.trunk, Cell("pr_moe") if cell.distilled else None]
        assert all(one is None or (one, seed) in runs[:place] for one in needed)


def test_the_best_learning_rate_is_the_minimum_of_a_parabola() -> None:
    rates = (1.0, 2.0, 4.0)
    assert best_rate(rates, [(np.log(rate) - 0.9) ** 2 for rate in rates]) == pytest.approx(np.exp(0.9))
    assert best_rate(rates, [3, 2, 1]) == 4.0 and best_rate(rates, [1, 2, 1.5]) == 1.0


def made_up(pairs: int = 16, **losses: float) -> dict[str, Any]:
    """Results of some seeds, with noise that pairs share, and some that they do not; `student__staged` is a distilled cell."""
    noise = np.random.default_rng(0)
    shared = noise.normal(scale=0.1, size=pairs + 1)
    runs = {}
    for number, (name, loss) in enumerate(losses.items()):
        config, _, how = name.partition("__")
        cell = Cell(config, 1.0, how or None)  # type: ignore[arg-type]
        for seed in range(1, pairs + 1):
            runs[f"{cell.name}-seed{seed}"] = {
                "val_loss": loss + shared[seed] + noise.normal(scale=0.004), "seed": seed, "params_total": 1e6 / (1 + number),
                "params_active": 1e5, "tokens_per_active_parameter": 20.0, "tokens": 8e6, "flops_per_token": 2.0**number,
            }  # fmt: skip
    return {"commit": "abc", "machine": "m", "learning_rates": {"dense": 1e-3}, "runs": runs}


def test_questions_all_have_a_reading() -> None:
    results = made_up(
        dense=3.8, moe_16=3.7, moe_32=3.7, pr_moe=3.702, residual=3.72, top_2_argmax=3.66, first_half=3.7, second_half=3.76,
        capacity=3.7240, student=3.7, student__staged=3.6, student__full=3.55,
    )  # fmt: skip
    results["speed"] = {"step_seconds": {"residual": 0.8, "top_2_argmax": 1.0}}
    assert {key: answer.reading for key, answer in answers(results).items()} == {
        "experts": AGREES, "cheaper": "cannot be tested here", "half": DIFFERS, "everywhere": DIFFERS, "residual": DIFFERS,
        "pr_moe": AGREES, "taught": AGREES, "staged": DIFFERS, "capacity": UNRESOLVED, "faster": AGREES,
    }  # fmt: skip
    few = answers(made_up(7, dense=3.8, moe_16=3.7))["experts"]
    assert few.reading == MISSING and few.pairs == "7 of 8"
    # A question is read from its planned pairs: more of them change nothing.
    assert answers(made_up(9, dense=3.8, moe_16=3.7))["experts"].pairs == "8"


def test_the_cost_at_equal_loss_is_read_off_the_dense_line() -> None:
    sizes = dict(zip(WIDER, (4.0, 3.9, 3.8, 3.7, 3.6), strict=True))  # 0.1 nats for each doubling of the cost
    runs = made_up(**sizes, moe_16=3.75)["runs"]
    costs = {name: 2.0**place for place, name in enumerate(WIDER)}
    found = cost_at_equal_loss(runs, "moe_16", costs | {"moe_16": 1.0})
    assert found is not None
    ratio, low, high = found
    assert ratio == pytest.approx(2**2.5, rel=0.1) and low <= ratio <= high


def test_pages_get_the_tables_of_the_campaign(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(made_up(dense=3.8, moe_16=3.7), page, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "**agrees**" in text
    assert "| model | parameters |" in (tmp_path / "claim_models.md").read_text()
    assert (tmp_path / "claims.png").stat().st_size > 5000 and (tmp_path / "costs.png").stat().st_size > 5000
    page.write_text("no place")
    with pytest.raises(ValueError, match=r"page\.md lacks the lines"):
        write(made_up(dense=3.8), page, tmp_path)


def test_committed_pages_have_the_committed_results() -> None:
    results = json.loads(RESULTS.read_text())
    assert with_text(PAGE.read_text(), BEGIN, END, long_table(results)) == PAGE.read_text()
    assert page_of_models(results) == (FIGURES / "claim_models.md").read_text()
    page = gate.PAGE.read_text()
    assert page == with_text(page, gate.BEGIN, gate.END, carry.tables(gate.read_rows(gate.RESULTS)))


def test_readings_follow_the_rules_that_were_fixed_before_the_runs() -> None:
    question = dataclasses.replace(QUESTIONS[2], pairs=8)  # as good as, by 0.02
    lower = dataclasses.replace(QUESTIONS[0], key="lower", pairs=8)
    for mean, reading in ((-0.1, AGREES), (0.0, AGREES), (0.0195, UNRESOLVED), (0.0215, UNRESOLVED), (0.06, DIFFERS)):
        assert readings([(question, PairedDifference(mean, 0.004, 8))]) == {question.key: reading}
    for mean, reading in ((-0.1, AGREES), (-0.005, UNRESOLVED), (0.1, DIFFERS)):
        assert readings([(lower, PairedDifference(mean, 0.004, 8))]) == {"lower": reading}
    assert readings([(lower, PairedDifference(-0.1, 0.004, 7)), (question, None)]) == {}  # pairs are missing
    # Holm: p = 0.02 counts alone, and not as the smaller of four.
    weak = (lower, PairedDifference(-0.012, 0.004, 8))
    others = [(dataclasses.replace(lower, key=str(n)), PairedDifference(0.0, 0.004, 8)) for n in range(3)]
    assert readings([weak]) == {"lower": AGREES} and readings([weak, *others])["lower"] == UNRESOLVED
