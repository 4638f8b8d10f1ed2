"""`make gate` at its smallest, its rule on differences computed by hand and drawn, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gate import __main__ as command
from benchmarks.gate import candidate as candidates
from benchmarks.gate import carry, models, page
from benchmarks.gate.__main__ import main as gate
from benchmarks.gate.candidate import check, costs, memory
from benchmarks.gate.records import Records, described
from benchmarks.gate.runs import series
from benchmarks.gate.sides import PAPER, Side
from benchmarks.gate.verdict import AS_GOOD, BETTER, UNRESOLVED, WORSE, seeds_of, steps_at_equal_cost, verdict
from benchmarks.reproduce.scale import CPU, TINY
from benchmarks.training import Launcher, train
from docs.examples.cosine_router import CosineRouter, CosineRouterConfig
from nlgmoe import Router, Routing, RoutingContext, load_model
from nlgmoe.tools.check.properties import check_layer
from nlgmoe.tools.report.runs import read_runs
from nlgmoe.validation import RunError, SettingError
from nlgmoe.without_effect import without_effect
from tests.support.in_process import Here

HERE = "tests.benchmarks.test_gate"
BASELINE = Side("paper", TINY, PAPER)
read_candidate = partial(candidates.read_candidate, base=PAPER)


@dataclass(frozen=True)
class DeafRouterConfig(CosineRouterConfig):
    """A candidate whose gate no loss reaches."""

    def build(self, config: Any, block: int) -> Router:
        router = super().build(config, block)
        router.__class__ = DeafRouter
        return router


class DeafRouter(CosineRouter):
    def forward(self, x: Any, context: RoutingContext) -> Routing:
        routing = super().forward(x, context)
        return replace(routing, weight=routing.weight.detach())


def test_verdict_of_the_gate_is_its_rule_on_differences_computed_by_hand() -> None:
    # Eight differences m + s, m - s, ...: the standard error is s / sqrt(7). With s = 0.01 half of the 95% interval is
    # 2.3646 * 0.01 / sqrt(7) = 0.00894, of the 90% interval 1.8946 * 0.01 / sqrt(7) = 0.00716.
    def judged(mean: float, spread: float = 0.01, pairs: int = 8) -> dict[str, Any]:
        shared = np.linspace(3, 4, pairs)
        return verdict(shared + mean + spread * (-1) ** np.arange(pairs), shared)

    for mean, expected in ((-0.0090, BETTER), (-0.0089, AS_GOOD), (0.0089, AS_GOOD), (0.0090, WORSE)):
        assert judged(mean)["reading"] == expected, mean
    assert judged(0.0, 0.05)["reading"] == UNRESOLVED  # 0.0358 is above the margin
    found = judged(0.0)
    assert found["resolution"] == pytest.approx(0.00894, abs=1e-5) and found["high"] == pytest.approx(0.00894, abs=1e-5)
    assert [judged(mean, pairs=6)["reading"] for mean in (-0.5, 0.0, 0.5)] == [UNRESOLVED, UNRESOLVED, WORSE]
    alone = judged(1.0, 0.0, pairs=1)
    assert alone["reading"] == UNRESOLVED and alone["low"] is alone["resolution"] is None


@pytest.mark.parametrize(
    ("mean", "reading", "share"), [(0.0, BETTER, 0.025), (0.0, WORSE, 0.025), (0.02, AS_GOOD, 0.05), (-0.05, BETTER, 1)]
)
def test_verdict_of_the_gate_is_wrong_as_often_as_its_rule_says(mean: float, reading: str, share: float) -> None:
    random, tries = np.random.default_rng(0), 2000
    drawn = random.normal(mean, 0.02, size=(tries, 8))
    found = [verdict(row, np.zeros(8))["reading"] for row in drawn]
    assert found.count(reading) / tries == pytest.approx(share, abs=0.012)


def test_gate_gives_the_costlier_side_fewer_tokens_and_starts_at_a_constant_rate(tmp_path: Path) -> None:
    assert [steps_at_equal_cost(ratio, 2400) for ratio in (1.0, 1.019, 0.981)] == [(2400, 2400)] * 3
    assert [steps_at_equal_cost(ratio, 2400) for ratio in (1.2, 0.5)] == [(2000, 2400), (2400, 1200)]
    assert seeds_of(8) == [1, 2, 3, 4, 5, 6, 7, 8] and seeds_of(10)[-2:] == [10, 11]  # 9 is for the learning rate
    side, records = Side("s", CPU, PAPER, ("{}",)), Records(tmp_path / "runs.json")
    assert [(steps, run.start) for steps, run in series(side, 1, [2400, 2000, 590], records, "n").items()] == [
        (2400, 0),
        (2000, 1440),
        (590, 0),
    ]
    own = json.loads(side.files(2000, 3)[-1])["model"]
    assert own["schedule"] == {"warmup_tokens": 60 * 2048, "decay_tokens": 2000 * 2048, "cooldown_tokens": 400 * 2048}
    assert own["seed"] == 3 and own["train_tokens"] == 2000 * 2048


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("data: {seed: 5}", "data.seed=5: the gate holds it fixed; an overlay sets model.config, but for vocab_size, seq_len, "),
        ("model: {config: {moe: {eval_capacity_factor: 2.0}}}", "model.config.moe.eval_capacity_factor=2.0: the gate holds"),
        ("model: {config: {seq_len: 64}}", "model.config.seq_len=64: the gate holds"),
        ("model: {config: '{\"seq_len\": 64}'}", "model.config.seq_len=64: the gate holds"),
        ("model.train_tokens: 99", "model.train_tokens=99: the gate holds"),
        ("model: {schedule: {min_lr: 1.0e-4}}", "model.schedule.min_lr=0.0001: the gate holds"),
        ("trainer: {gradient_clip_val: 0.5}", "trainer.gradient_clip_val=0.5: the gate holds"),
        ("trainer: {gradient_clip_val: null}", "trainer.gradient_clip_val=None: the gate holds"),
        ("model: {curriculum: {tokens: 9, start: 8}}", "model.curriculum.increment=8: the gate holds"),
        ("trainer: {max_steps: 9}", "trainer.max_steps=9: the gate holds"),
        ("model: {optimizer: {lr_scale: {gate: 2.0}}}", "model.optimizer.lr_scale.gate=2.0 ("),
    ],
)  # fmt: skip
def test_gate_refuses_an_overlay_of_what_is_held_fixed_by_name(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SettingError) as refusal:
        read_candidate(str(tmp_path / "mine.yaml"), None, TINY)
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_pair_has_runs_of_one_numerics_and_each_result_is_committed(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    records = Records(tmp_path / "runs.json", commits=True)
    sides = Side("idea", CPU, PAPER, ("{}",), home=Path("idea-a")), Side("paper", CPU, PAPER, home=Path("paper-p"))
    for number, (side, numerics, steps, loss) in enumerate(
        [
            (sides[0], "q", 2400, 3.5),
            (sides[1], "p", 2400, 4.0),
            (sides[0], "p", 2400, 3.9),
            (sides[0], "p", 2000, 3.95),
        ]
    ):
        assert not records.pair(sides, 1, [(2400, 2400), (2000, 2400)], "p"), number
        about = {**described(side), "numerics": numerics, "seed": 1, "steps": steps}
        records.add(f"{side.home.name} {numerics} {steps}", {**about, "val_loss": loss})
    assert records.pair(sides, 1, [(2400, 2400), (2000, 2400)], "p") == [{2400: 3.9, 2000: 3.95}, {2400: 4.0}]
    assert not records.pair(sides, 2, [(2400, 2400)], "p")
    changed = replace(sides[0], home=Path("idea-b"))  # its class computes something else, on the same processor
    assert not records.pair((changed, sides[1]), 1, [(2400, 2400)], "p")
    elsewhere = replace(sides[0], home=Path("idea-c")), replace(sides[1], home=Path("paper-r"))  # another processor
    assert Records(tmp_path / "runs.json").pair(elsewhere, 1, [(2400, 2400)], "r") == [
        {2400: 3.9, 2000: 3.95},
        {2400: 4.0},
    ]
    log = subprocess.run(["git", "log", "--oneline"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert log.count("validation loss") == 4


def test_a_change_between_baselines_is_its_rule_on_numbers_computed_by_hand() -> None:
    def row(name: str, base: str, effect: float) -> dict[str, Any]:
        noise = [0.01 * (-1) ** seed * (base == "strong") for seed in range(8)]
        ours = {str(seed): 3 + effect + noise[seed] for seed in range(8)}
        losses = {"candidate": {"2400": ours}, "baseline": {"2400": dict.fromkeys(ours, 3.0)}}
        return {"name": name, "baseline": base, "losses": losses, "steps": {"tokens": [2400, 2400]}}

    # Standard error 0.01 / sqrt(7) = 0.00378; of 0.0134, t = 3.545, p = 0.0094; of 0.0140, p = 0.0075; 0.0108: p = 0.0244.
    # Holm: 0.0075 * 4 = 0.030, 0.0094 * 3 = 0.028, 0.0244 * 2 = 0.049 and then 0.0300 * 1.
    for last, reading in ((0.0102, "changed"), (0.0080, "no change shown")):
        shifts = dict(zip(carry.CARRIED, (0.0134, 0.0140, 0.0108, last), strict=True))
        rows = [
            row(name, base, shift * (base == "strong"))
            for name, shift in shifts.items()
            for base in ("paper", "strong")
        ]
        readings = {name: found for name, (_, found) in carry.changes(rows).items()}
        assert readings == dict.fromkeys(carry.CARRIED, "changed") | {carry.CARRIED[-1]: reading}
    rows = [row(name, base, 0.0110 * (base == "strong")) for name in carry.CARRIED for base in ("paper", "strong")]
    assert {found for _, found in carry.changes(rows).values()} == {"no change shown"}  # p = 0.0225, times 4


def test_gate_takes_classes_of_three_kinds_and_overlays(tmp_path: Path) -> None:
    found = read_candidate("docs.examples.hash_router.HashRouterConfig", None, CPU)
    assert found.name == "HashRouterConfig"
    assert "moe.token_dropping=False (with HashRouterConfig)" in without_effect(found.config)  # of moe_16.yaml
    network = read_candidate("nlgmoe.layers.feed_forward.SwiGLUNetwork", "x", CPU)
    assert type(network.config.moe.expert).__name__ == "SwiGLUNetwork"
    assert read_candidate("nlgmoe.layers.attention.MultiHead", "y", CPU).config.attention is not None
    (tmp_path / "slow.yaml").write_text("model: {optimizer: {lr: 1.0e-3}}")
    (tmp_path / "dense.yaml").write_text("model: {config: {moe: null}}")
    assert read_candidate(str(tmp_path / "dense.yaml"), None, CPU).config.moe is None
    slow = read_candidate(str(tmp_path / "slow.yaml"), None, CPU)
    assert (slow.name, slow.learning_rate, found.learning_rate) == ("slow", 1e-3, pytest.approx(0.00599, abs=1e-5))
    for text, name in (("nlgmoe.GPTConfig", None), ("hash", None), (str(tmp_path / "slow.yaml"), "strong")):
        with pytest.raises(SettingError):
            read_candidate(text, name, CPU)


def test_gate_runs_no_candidate_that_fails_a_property_or_needs_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = read_candidate(f"{HERE}.DeafRouterConfig", None, TINY)
    monkeypatch.setattr(candidates, "check_layer", partial(check_layer, only={"the losses reach the gate"}))
    with pytest.raises(RunError, match=r"DeafRouterConfig fails `nlgmoe check`: the losses reach the gate: "):
        check(deaf, BASELINE)
    assert "left out" in check(BASELINE, BASELINE)
    monkeypatch.setattr(candidates, "available_memory", lambda: 10**9)
    with pytest.raises(SettingError, match=r"--jobs=2: 1.\d GB predicted for 2 runs of paper, 1.0 GB available"):
        memory(BASELINE, 2)


def test_gate_ends_at_a_failed_run(tmp_path: Path) -> None:
    class Failing(Launcher):
        started = 0

        def __call__(self, command: list[str], log: Path, tree: Path) -> int:
            self.started += 1
            log.write_text("...\nerror: step 12: the loss is nan")
            return 1

    launch, side = Failing(), replace(BASELINE, home=tmp_path)
    records = Records(tmp_path / "runs.json")
    lines = [[*series(side, seed, [], records, "n").values()] for seed in range(1, 9)]
    with pytest.raises(RunError, match=r" seed. ended with exit code 1: error: step 12: the loss is nan"):
        train(lines, 1, launch)
    assert launch.started == 1


def test_gate_names_a_loss_that_is_not_finite_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], pocket_pile: Path
) -> None:
    (tmp_path / "wild.yaml").write_text("model: {optimizer: {lr: 1.0e+30}}")
    with pytest.raises(SystemExit) as end:
        gate(
            [
                str(tmp_path / "wild.yaml"),
                f"--out={tmp_path}/runs",
                f"--results={tmp_path}/rows.json",
                f"--runs={tmp_path}/r.json",
                "--scale=tiny",
            ]
        )
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: wild-first-steps ended with exit code 1: error: step 1: the loss is nan")
    assert end.value.code == 1 and not (tmp_path / "rows.json").exists()


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_gate_writes_the_row_of_a_candidate(pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "top-2.yaml").write_text("model: {config: {moe: {top_k: 2, second_expert: argmax}}}")
    rows, out = tmp_path / "rows.json", tmp_path / "runs"
    monkeypatch.setattr(candidates, "check_layer", partial(check_layer, only={"capacity is the formula"}))
    monkeypatch.setattr(command, "costs", lambda *sides: {**costs(*sides, rounds=1), "seconds": 1.01})
    words = [str(tmp_path / "top-2.yaml"), f"--out={out}", f"--results={rows}", f"--runs={tmp_path}/r.json"]
    words += ["--scale=tiny", "--jobs=1", "--author=me", "--pairs=2", "--baseline=paper"]

    first = Here(killed=5)  # two fingerprints, then the runs
    with pytest.raises(SystemExit):
        gate(words, first)
    again = Here(killed=0)
    gate(words, again)
    trained = [Path(word.partition("=")[2]) for run in again.commands for word in run if "default_root_dir" in word]
    assert [f"{folder.parent.name[:5]} {folder.name}" for folder in trained[2:]] == [
        *("paper seed1", "top-2 seed2", "top-2 seed2-16", "paper seed2"),
    ]  # seed 1 of the candidate, and its shorter run, had ended
    (row,) = page.read_rows(rows)
    assert row["steps"] == {"tokens": [20, 20], "flops": [16, 20], "seconds": [20, 20]}  # 1.22 times the FLOPs
    losses = {side: {n: list(of.values()) for n, of in found.items()} for side, found in row["losses"].items()}
    verdicts, ours, theirs = row["verdicts"], losses["candidate"], losses["baseline"]
    assert verdicts["flops"] == verdict(ours["16"], theirs["20"])
    assert verdicts["tokens"] == verdicts["seconds"] == verdict(ours["20"], theirs["20"])
    assert verdicts["tokens"]["mean"] != verdicts["flops"]["mean"]
    described = {"name", "author", "commit", "versions", "machine", "command", "numerics", "parameters", "costs"}
    assert described < row.keys()
    # The shorter run goes on from step 12 of the whole one, and decays.
    shorter = next(out.glob("top-2-*/seed1-16"))
    assert json.loads((shorter / "summary.json").read_text())["tokens"] == 16 * TINY.step_tokens
    (run,) = read_runs([shorter])
    assert run.metrics["train/tokens"].min() >= 12 * TINY.step_tokens
    curves = (out / "top-2-paper.html").read_text()
    assert len(curves) > 1e6 and page.in_lines(row).splitlines()[1] in curves and "minus <select" not in curves
    # A second look costs no run; the row of the same name and author is replaced.
    last = Here(killed=0)
    gate([*words, "--name=top-2"], last)
    assert len(last.commands) == 2 and page.read_rows(rows) == [row | {"command": page.read_rows(rows)[0]["command"]}]
    text = page.table([row, row | {"name": "other", "baseline": "strong"}])
    assert "2 rows" in text
    first, second = (
        line.split(" | ") for line in text.splitlines() if line.startswith(("| top-2 | me", "| other | me"))
    )
    assert [bool(cell.strip(" |")) for cell in (*first[2:], *second[2:])] == [True, False, False, True]


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_models_of_a_release_are_those_of_the_runs_in_half_precision(
    pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "IDEAS", ("hash_routing",))
    monkeypatch.setattr(models, "SEEDS", (2,))
    models.main([str(tmp_path / "release"), f"--out={tmp_path}/runs", "--scale=tiny", "--jobs=1"], Here(killed=0))
    trained = load_model(tmp_path / "runs/hash_routing-seed2").state_dict()
    released = load_model(tmp_path / "release/hash_routing-seed2.ckpt")
    for name, value in released.state_dict().items():
        expected = trained[name]
        assert value.dtype == (torch.float16 if expected.is_floating_point() else torch.int64)
        assert torch.equal(value, expected.to(value.dtype)), name
    assert released.float()(torch.zeros(1, 4, dtype=torch.int64)).hidden.isfinite().all()
