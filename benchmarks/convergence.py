"""Does a change of the numerics change what is learnt? `make convergence` answers, before such a change is merged.

Trains the PR-MoE of `convergence.yaml` for 2,000 steps with the code of two commits, in fp32 and in bf16-mixed, with each seed.
A seed fixes initial weights, data and noise, so runs come in pairs. Two runs that differ in rounding alone are apart after a few
hundred steps, as if they were of different seeds; what the change does is the mean difference in the final validation
loss, and has to be at most 0.005 nats in either precision.

The standard error over the seeds says what that is worth. `false alarm` is the probability of a mean difference above the limit
where there is none; if it is above 5%, give more `--seeds`. `--control` measures the noise: the older commit against itself, with
a learning rate that is a millionth larger. Each commit is checked out into a temporary worktree, so that uncommitted changes do
not count. Runs that are finished are kept in `--out` and not repeated.

    python -m benchmarks.convergence [--against 338e1af] [--revision HEAD] [--seeds 3] [--jobs 2] [--control] [--tiny]
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.runs import ROOT, budget, mean_and_error, train

LIMIT = 0.005  # nats
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
LAST = 200  # steps whose mean training loss is reported too
CONFIG = ROOT / "benchmarks" / "convergence.yaml"
CONTROL = {"model.optimizer.lr": 0.003000003}  # a millionth more: another rounding of some weights in the first steps
TINY = budget(1024) | {"model.schedule.warmup_tokens": 512, "data.max_eval_windows": 1}  # two steps


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def checked_out(commit: str, out: Path) -> Iterator[Path]:
    """A temporary worktree of a commit."""
    folder = Path(tempfile.mkdtemp(prefix="tree-", dir=out))
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def run(
    commit: str, tree: Path, precision: str, seed: int, control: bool, args: argparse.Namespace
) -> dict[str, float]:
    """Train once: the validation loss at the end, and the mean training loss of the last steps."""
    folder = args.out / f"{commit[:10]}-{precision}-{seed}{'-control' if control else ''}{'-tiny' if args.tiny else ''}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted comparison left
    settings = {
        "model.seed": seed,
        "data.seed": seed,
        "data.data_dir": args.data_dir.resolve(),
        "trainer.precision": PRECISIONS[precision],
        **(TINY if args.tiny else {}),
        **(CONTROL if control else {}),
    }
    summary = train(CONFIG, folder, settings, root=tree)
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    return {"validation": summary["val_loss"], "training": statistics.mean(losses[-LAST:])}


def compare(old: list[dict[str, float]], new: list[dict[str, float]]) -> dict[str, Any]:
    """New minus old by seed, and what the mean is worth."""
    found: dict[str, Any] = {"old": old, "new": new}
    for kind in ("validation", "training"):
        differences = [after[kind] - before[kind] for before, after in zip(old, new, strict=True)]
        mean, error = mean_and_error(differences)
        alarm = 2 * statistics.NormalDist(sigma=error).cdf(-LIMIT) if error > 0 else 0.0
        found[kind] = {
            "difference": mean,
            "standard_error": error if error == error else None,  # one seed has none
            "by_seed": differences,
            "false_alarm": alarm,
        }
    return found


def main() -> None:
    """Train, print the differences, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="338e1af", help="the older commit")
    parser.add_argument("--revision", default="HEAD", help="the newer commit")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--control", action="store_true", help="the older commit against itself, for the noise")
    parser.add_argument("--tiny", action="store_true", help="two steps of one seed, to see that it runs")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data/pocket_pile")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/convergence", help="folder of the runs")
    parser.add_argument("--results", type=Path, help="by default docs/results/convergence.json, with --tiny in --out")
    args = parser.parse_args()
    args.out = args.out.resolve()  # git runs in the repository's root
    args.out.mkdir(parents=True, exist_ok=True)
    args.results = args.results or (args.out if args.tiny else ROOT / "docs/results") / "convergence.json"

    commits = {"old": git("rev-parse", "--verify", f"{args.against}^{{commit}}")}
    commits["new"] = commits["old"] if args.control else git("rev-parse", "--verify", f"{args.revision}^{{commit}}")
    if not args.control and git("status", "--porcelain", "--", "nlgmoe", "train.py"):
        print(f"uncommitted changes are not in {args.revision}", file=sys.stderr)
    seeds = range(1 if args.tiny else args.seeds)
    with (
        checked_out(commits["old"], args.out) as old,
        checked_out(commits["new"], args.out) as new,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        trees = {"old": old, "new": new}
        pending = {
            (precision, which, seed): pool.submit(
                run, commits[which], trees[which], precision, seed, args.control and which == "new", args
            )
            for precision in args.precisions
            for seed in seeds
            for which in trees
        }
        try:
            runs = {key: one.result() for key, one in pending.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that have not begun
            raise

    comparison = {
        **commits,
        "precisions": {
            precision: compare(*([runs[precision, which, seed] for seed in seeds] for which in ("old", "new")))
            for precision in args.precisions
        },
    }
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    kind = "control" if args.control else "comparison"
    if all(
        results.get(kind, {}).get(which) == commits[which] for which in commits
    ):  # of a precision that is not repeated
        comparison["precisions"] = results[kind]["precisions"] | comparison["precisions"]
    results |= {
        "limit": LIMIT,
        "command": f"python -m benchmarks.convergence {' '.join(sys.argv[1:])}".rstrip(),
    }
    results[kind] = comparison
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=2) + "\n")

    print(f"\n{commits['new'][:7]} - {commits['old'][:7]}, nats, {len(seeds)} seed(s)")
    print(f"{'':5} {'validation':>20} {'false alarm':>12} {f'last {LAST} steps':>20}")
    beyond = False
    for precision, found in comparison["precisions"].items():
        validation, training = found["validation"], found["training"]
        shown = [f"{one['difference']:+.4f} ± {one['standard_error'] or 0:.4f}" for one in (validation, training)]
        print(f"{precision:5} {shown[0]:>20} {validation['false_alarm']:>12.1%} {shown[1]:>20}")
        beyond |= abs(validation["difference"]) > LIMIT
    print(f"written to {args.results}")
    if beyond:
        print(f"a mean difference is above {LIMIT} nats", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
