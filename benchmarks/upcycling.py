"""Which way of upcycling is best here: copies, shards, units drawn anew, beside two controls.

    python -m benchmarks.upcycling [--jobs 2] [--commit]      about 4 hours on two cores; stopped, the same command continues
    python -m benchmarks.upcycling --table

List and rule were committed before the first run. For each of the gate's seeds a dense model with the settings of its strong
baseline is trained for half the tokens at a constant rate. Then each arm trains for the other half from its weights, all with the
same warm-up, cooldown and order of text, other than that of the first half:

    dense         control: the dense model itself
    copy          16 experts, top-1
    shards        64 experts of a quarter of the width, top-4: granularity 4
    redrawn       16 experts, top-1, half of the inner units drawn anew

`scratch` is the second control: the strong baseline, a mixture of 16 experts, from random weights for all tokens; its runs are
the gate's. d = loss of an arm - loss of a control, in pairs by seed, judged by the gate's rule (`benchmarks/gate/verdict.py`):

    minus dense      at equal tokens, FLOPs and seconds of the second half; a costlier arm also trains for `tokens / ratio`
    minus scratch    at equal tokens; the first half of an arm is cheaper

The advice of docs/upcycling.md names the way with the lowest mean loss at equal tokens, and says which differences from it are
resolved by their 95% intervals. No verdict is corrected for the number of arms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from benchmarks.documents import markdown_table
from benchmarks.gate.candidate import costs
from benchmarks.gate.records import RUNS, Record, Records
from benchmarks.gate.runs import StoredRun
from benchmarks.gate.sides import STRONG, Side
from benchmarks.gate.verdict import COSTS, PLANNED_PAIRS, in_words, seeds_of, steps_of, verdict
from benchmarks.reproduce.scale import CPU, Scale, run_settings
from benchmarks.runs import ROOT, processor
from benchmarks.training import Launcher, train
from nlgmoe.config import MoEConfig
from nlgmoe.surgery.upcycle import Ways, upcycle

FILE = ROOT / "docs/results/upcycling.json"
OTHER_TEXT = 1000  # added to the seed of the order in the second half
DENSE = json.dumps({"model": {"config": {"moe": None}}})
# Over the strong baseline's mixture; a YAML section is merged.
ARMS: dict[str, tuple[dict[str, Any] | None, Ways]] = {
    "dense": (None, Ways()),
    "copy": ({}, Ways()),
    "shards": ({"num_experts": 64, "top_k": 4, "expert_ffn_size": 51}, Ways(granularity=4)),
    "redrawn": ({}, Ways(redraw=0.5)),
}


@dataclass(frozen=True)
class Continued(StoredRun):
    """A run from the weights of the first half, which are upcycled before.

    Attributes:
        dense: checkpoint of the first half.
        start_from: checkpoint that the run starts from.
        moe: of the mixture; None: a dense model.
        ways: of upcycling.
    """

    dense: Path = field(kw_only=True)
    start_from: Path = field(kw_only=True)
    moe: MoEConfig | None = field(kw_only=True)
    ways: Ways = field(kw_only=True)

    @override
    def train(self, launch: Launcher) -> str:
        """See `Run`."""
        if self.moe is not None and not self.start_from.exists():
            self.start_from.parent.mkdir(parents=True, exist_ok=True)
            upcycle(self.dense, self.start_from, self.moe, self.ways)
        return super().train(launch)


def overlay(arm: str) -> str:
    moe, _ = ARMS[arm]
    return DENSE if moe is None else json.dumps({"model": {"config": {"moe": moe}}})


def side(arm: str, scale: Scale) -> Side:
    """Return an arm as the gate's costs take it."""
    return Side(arm, scale, STRONG, (overlay(arm),))


def line(seed: int, lengths: dict[str, set[int]], scale: Scale, out: Path, records: Records) -> list[StoredRun]:
    """Return the runs of a seed in the order of training: the first half, and the arms, each with its numbers of steps."""
    half = scale.steps // 2
    files = (*STRONG.files, DENSE)
    rate, cooldown = side("dense", scale).learning_rate, side("dense", scale).cooldown
    first = _logged(run_settings(scale, ROOT, scale.steps, seed, rate, cooldown))
    first["trainer"]["max_steps"] = half  # before the cooldown
    trunk = StoredRun(
        f"first-half seed{seed}",
        out / f"first-half/seed{seed}",
        (*files, json.dumps(first)),
        half,
        keep=True,
        records=records,
        about=_about("first-half", seed, half),
    )
    runs: list[StoredRun] = []
    dense = trunk.folder / "checkpoints/last.ckpt"
    for arm, (_, ways) in ARMS.items():
        moe = side(arm, scale).config.moe
        start = dense if moe is None else out / f"{arm}/seed{seed}.ckpt"
        for steps in sorted(lengths[arm], reverse=True):
            own = _logged(run_settings(scale, ROOT, steps, seed, rate, 2 * cooldown))  # the same number of steps
            own["model"]["warm_start"] = {"checkpoint": str(start)}
            own["data"]["seed"] = seed + OTHER_TEXT
            name, settings = f"{arm}-{steps}", (*STRONG.files, overlay(arm), json.dumps(own))
            runs.append(
                Continued(
                    f"{name} seed{seed}",
                    out / f"{name}/seed{seed}",
                    settings,
                    steps,
                    records=records,
                    about=_about(arm, seed, steps),
                    dense=dense,
                    start_from=start,
                    moe=moe,
                    ways=ways,
                )
            )
    needed = any(not run.has_ended for run in runs)
    return [replace(trunk, again=needed and not dense.exists()), *runs]


def _logged(settings: dict[str, Any]) -> dict[str, Any]:
    settings["trainer"]["logger"] = True
    return settings


def _about(arm: str, seed: int, steps: int) -> Record:
    return {"name": arm, "seed": seed, "steps": steps, "numerics": processor()}


def lengths_of(records: Records, scale: Scale) -> dict[str, set[int]]:
    """Return the steps of each arm; measure its costs if they are not stored."""
    half = scale.steps // 2
    lengths = {"dense": {half}}
    for arm in list(ARMS)[1:]:
        if arm not in records.costs:
            records.costs[arm] = costs(side(arm, scale), side("dense", scale))
        lengths[arm] = {own for own, _ in steps_of(records.costs[arm], half).values()}
        lengths["dense"] |= {base for _, base in steps_of(records.costs[arm], half).values()}
    return lengths


def table(records: Records, scratch: Sequence[Record], seeds: Sequence[int], scale: Scale) -> str:
    """Return the verdicts as a table; pairs that are not complete are left out."""
    half, rows = scale.steps // 2, []
    losses = {(run["name"], run["steps"], run["seed"]): run["val_loss"] for run in records.runs.values()}
    whole = {run["seed"]: run["val_loss"] for run in scratch}

    def judged(arm: str, lengths: tuple[int, int], control: dict[int, float] | None) -> str:
        pairs = []
        for seed in seeds:
            own, other = losses.get((arm, lengths[0], seed)), losses.get(("dense", lengths[1], seed))
            other = other if control is None else control.get(seed)
            pairs += [(own, other)] if own is not None and other is not None else []
        return in_words(verdict(*zip(*pairs, strict=True))) if pairs else ""

    for arm in list(ARMS)[1:]:
        lengths = steps_of(records.costs[arm], half) if arm in records.costs else {}
        cells = [judged(arm, lengths[kind], None) if lengths else "" for kind in ("tokens", *COSTS)]
        rows.append([arm, *cells, judged(arm, (half, half), whole)])
    rows.append(["dense", "", "", "", judged("dense", (half, half), whole)])
    return markdown_table(("way", "minus dense: tokens", "FLOPs", "seconds", "minus scratch: tokens"), rows)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="lines of runs at a time, one thread each")
    parser.add_argument("--pairs", type=int, default=PLANNED_PAIRS, help="seeds")
    parser.add_argument("--commit", action="store_true", help="commit each result as its run ends")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/upcycling", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=FILE, help="JSON file of the results")
    words = parser.parse_args()
    records, seeds = Records(words.results, words.commit), seeds_of(words.pairs)
    if not words.table:
        lengths, launch = lengths_of(records, CPU), Launcher()
        train([line(seed, lengths, CPU, words.out, records) for seed in seeds], words.jobs, launch)
    gate = [run for run in Records(RUNS).runs.values() if run["name"] == "strong" and run["steps"] == CPU.steps]
    print(table(records, gate, seeds, CPU))


if __name__ == "__main__":
    main()
