"""Judge an idea against the standard MoE of the claims: better, as good as, worse, or unresolved; docs/gate.md.

    python -m benchmarks.gate my_router.MyRouterConfig               a router, an expert or an attention, by class_path
    python -m benchmarks.gate mine.yaml --pairs 2                    an overlay of settings; a first look
    python -m benchmarks.gate --status                               what of the planned rows is done, running and missing
    python -m benchmarks.gate --tables                               renew docs/results/gate.md from gate.json

It can be stopped at any time, and resumes when it is started again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.gate import carry
from benchmarks.gate.campaign import status
from benchmarks.gate.candidate import check, costs, memory, read_candidate
from benchmarks.gate.page import RESULTS, Row, add_row, in_lines, make_row, read_rows, write_tables
from benchmarks.gate.records import RUNS, Records
from benchmarks.gate.runs import placed, run_of, trained_pairs
from benchmarks.gate.sides import BASELINES, STRONG, Side
from benchmarks.gate.verdict import COSTS, TUNING_SEED, seeds_of, steps_of, verdict
from benchmarks.reproduce.campaign import best_rate
from benchmarks.reproduce.scale import TINY
from benchmarks.runs import ROOT
from benchmarks.training import Launcher, train
from nlgmoe.cli.errors import one_line_errors
from nlgmoe.tools.report.page import write_report
from nlgmoe.tools.report.runs import read_runs
from nlgmoe.validation import SettingError, require

FACTORS = (0.5, 1.0, 2.0)  # of the search for a learning rate, at half the tokens, as for the claims
MOST = 20  # times the cost; a shorter run has a warm-up too
BUSY = 3.0  # load average; the gate's own checks and first steps, just before, reach 2 on two cores


def judge(
    candidate: Side, records: Records, out: Path, pairs: int, jobs: int, tune: bool, launch: Launcher
) -> dict[str, Any]:
    """Check, measure, train and compare; return what a row has of it.

    Args:
        candidate: the idea.
        records: results that are there, and those to come.
        out: folder of the runs.
        pairs: seeds.
        jobs: runs at a time, one thread each.
        tune: search the candidate's learning rate first.
        launch: starts a command.
    """
    baseline = placed(Side(candidate.base.name, candidate.scale, candidate.base), out, launch)
    numerics = baseline.fingerprint
    print(check(candidate, baseline), memory(candidate, jobs), sep="\n", flush=True)
    searched: dict[float, float] = {}
    if tune:
        rates = [factor * baseline.learning_rate for factor in FACTORS]
        half = candidate.scale.steps // 2
        tuning = {
            rate: run_of(placed(replace(candidate, rate=rate), out, launch), TUNING_SEED, half, records, numerics)
            for rate in rates
        }
        train([[run] for run in tuning.values()], jobs, launch)
        searched = {rate: run.loss for rate, run in tuning.items()}
        candidate = replace(candidate, rate=best_rate(searched, searched.values()))
        print(f"learning rate: {candidate.learning_rate:.2g}, from the losses {searched}")
    both = candidate, baseline = placed(candidate, out, launch), baseline
    measured, whole = costs_of(both, records, numerics), candidate.scale.steps
    steps = steps_of(measured, whole)
    seeds, lengths = seeds_of(pairs), [*steps.values()]
    losses = trained_pairs(both, seeds, lengths, records, numerics, jobs, launch)
    ours, theirs = (
        {length: {seed: losses[seed][place][length] for seed in seeds} for length in dict.fromkeys(of)}
        for place, of in enumerate(zip(*lengths, strict=True))
    )
    judged = {kind: verdict([*ours[n].values()], [*theirs[m].values()]) for kind, (n, m) in steps.items()}
    outcome = {
        "baseline": candidate.base.name,
        "numerics": numerics,
        "learning_rate": candidate.learning_rate,
        "searched": searched,
        "costs": {key: measured[key] for key in (*COSTS, "flops_per_token", "step_seconds", "rounds")},
        "steps": steps,
        "losses": {"candidate": ours, "baseline": theirs},
        "verdicts": judged,
    }
    text = in_lines({"name": candidate.name, **outcome}) + "\n\nBelow are the runs of all tokens, without shorter ones."
    trained = [side.home / f"seed{seed}" for seed in seeds for side in both]
    if here := [folder for folder in trained if (folder / "summary.json").exists()]:
        page = write_report(read_runs(here), out / f"{candidate.name}-{candidate.base.name}.html", "seed", text)
        print(f"curves: {page}")
    return outcome


def costs_of(sides: tuple[Side, Side], records: Records, numerics: str) -> dict[str, Any]:
    """Return the costs of candidate and baseline, which are measured once: a resumed gate has the same shorter runs."""
    candidate = sides[0]
    if not records.costs_of(candidate, numerics):
        print("time of a step: both models in turn, a minute or two", flush=True)
        busy = os.getloadavg()[0]
        records.add_costs(candidate, numerics, costs(*sides))
        if busy > BUSY:
            problem = f"the machine was busy (load average {busy:.1f})"
            print(f"{problem}; to measure again, stop, and delete {candidate.home.name} in {records.file}", flush=True)
    measured = records.costs_of(candidate, numerics)
    print(
        f"costs: {measured['flops']:.3f} times the FLOPs a token, {measured['seconds']:.3f} times the seconds",
        flush=True,
    )
    ratio = max(measured[kind] for kind in COSTS)
    problem = f"{candidate.name}: a token costs {ratio:.0f} times the baseline's"
    require(ratio < MOST, f"{problem}; the gate takes less than {MOST}")
    return measured


def main(argv: list[str] | None = None, launch: Launcher | None = None) -> None:
    """Judge a candidate, and add its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "candidate", nargs="?", help="class_path of a RouterConfig, ExpertConfig or AttentionConfig, or YAML"
    )
    parser.add_argument("--name", help="of the row; default: that of the class or file")
    parser.add_argument("--pairs", type=int, help="seeds; default: 8, of strong_2x 4; fewer are a first look")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--tune", action="store_true", help="search the learning rate: three runs of half the tokens")
    parser.add_argument("--author", help="default: git's user.name")
    parser.add_argument(
        "--results",
        type=Path,
        help="JSON file of the rows; default: docs/results/gate.json; of a first look OUT/gate.json",
    )
    parser.add_argument("--baseline", choices=[*BASELINES], default=STRONG.name, help="what the idea is compared with")
    parser.add_argument("--runs", type=Path, default=RUNS, help="JSON file of the results of single runs")
    parser.add_argument("--commit", action="store_true", help="commit that file as each run ends")
    parser.add_argument("--status", action="store_true", help="show what of the planned rows is missing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gate", help="folder of the runs")
    parser.add_argument("--tables", action="store_true", help="renew the tables of docs/results/gate.md")
    parser.add_argument(
        "--scale", choices=["whole", "tiny"], default="whole", help="tiny: twenty steps a run, for a test"
    )
    args = parser.parse_args(argv)
    base, launch = BASELINES[args.baseline], launch or Launcher()
    scale, pairs = TINY if args.scale == "tiny" else base.scale, base.pairs if args.pairs is None else args.pairs
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which devices there are
    with one_line_errors():
        if args.tables:
            rows = read_rows(RESULTS)
            write_tables(carry.tables(rows))
            if carry.changes(rows):
                carry.draw(rows, RESULTS.parent / carry.FIGURE)
            return
        require(pairs > 0 and args.jobs > 0, "--pairs and --jobs must be at least 1")
        out, records = args.out.resolve(), Records(args.runs.resolve(), args.commit)
        if args.status:
            print(status(records, out, args.jobs))
            return
        require(args.candidate is not None, "no candidate: give a class_path or a YAML file")
        out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(out / ".lock", timeout=0):
                candidate = read_candidate(args.candidate, args.name, scale, base)
                print(in_lines(enter(candidate, args, pairs, records, out, launch)))
        except Timeout:
            raise SettingError(f"--out={out}: another process works in it; wait for it, or name another one") from None


def enter(candidate: Side, args: argparse.Namespace, pairs: int, records: Records, out: Path, launch: Launcher) -> Row:
    """Judge a candidate, and add its row to the file."""
    row = make_row(candidate, args.author, **judge(candidate, records, out, pairs, args.jobs, args.tune, launch))
    whole = candidate.scale is not TINY and pairs >= candidate.base.pairs
    add_row(args.results or (RESULTS if whole else out / "gate.json"), row)
    return row


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs are stopped, and saved
    # Classes are found in the working directory and beside a YAML file, here and in the runs.
    places = [os.getcwd(), *(str(Path(word).resolve().parent) for word in sys.argv[1:] if word.endswith(".yaml"))]
    sys.path += places
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*places, os.environ.get("PYTHONPATH")]))
    main()
