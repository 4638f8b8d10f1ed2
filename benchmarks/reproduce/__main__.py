"""Train the models of the paper's claims, and answer the questions about them: `make reproduce`.

    python -m benchmarks.reproduce [--question KEY ...] [--jobs 2]   train what is missing, then write pages and figures
    python -m benchmarks.reproduce --out OUT --results FILE          train all with the code of HEAD; write FILE only
    python -m benchmarks.reproduce --tables                          write page and figures from docs/results/reproduce.json
    python -m benchmarks.reproduce --speed                           time a training step of each model; on a quiet machine
    python -m benchmarks.reproduce --scale tiny                      twenty steps a run, into a temporary folder

One commit's code trains all runs, in a worktree below --out: the commit in --results, or HEAD for new results. It can be stopped
at any time, and resumes when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks.reproduce.campaign import Campaign
from benchmarks.reproduce.cells import SEEDS
from benchmarks.reproduce.questions import LARGER, QUESTIONS, runs_of
from benchmarks.reproduce.scale import CPU, TINY
from benchmarks.reproduce.speed import measure
from benchmarks.reproduce.tables import long_table, write
from benchmarks.runs import ROOT, git
from nlgmoe.files import write_json

RESULTS = ROOT / "docs/results/reproduce.json"


def checked_out(results: Path, out: Path) -> tuple[str, Path]:
    """Return the commit of the campaign, and a worktree of it.

    Raises:
        ValueError: the folder has runs of another commit, whose checkpoints this one would resume.
    """
    commit = json.loads(results.read_text())["commit"] if results.exists() else git("rev-parse", "HEAD")
    tree = out / f"code-{commit[:10]}"
    if others := [other.name for other in out.glob("code-*") if other != tree]:
        raise ValueError(f"{out} has runs of {others[0]}, not of {tree.name}; name another --out, or delete it")
    if not tree.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(tree), commit)
    return commit, tree


def prepare_data(tree: Path) -> None:
    """Tokenize the pocket Pile below `tree` with its own code: shards of another commit may have another format."""
    command = [sys.executable, "-m", "nlgmoe", "prepare-data", "--tokenizer", "pocket-1k"]
    if code := subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}).returncode:
        sys.exit(code)


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", nargs="*", choices=[question.key for question in (*QUESTIONS, *LARGER)],
                        help="default: all but those at the larger size")  # fmt: skip
    parser.add_argument("--scale", choices=["cpu", "tiny"], default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/reproduce", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="train nothing")
    parser.add_argument("--speed", action="store_true", help="train nothing; time a step of each model, one thread")
    args = parser.parse_args()
    if args.tables:
        write(json.loads(args.results.read_text()))
        return
    chosen = [question for question in (*QUESTIONS, *LARGER) if question.key in (args.question or ())]
    wanted = runs_of(chosen or QUESTIONS, tables=not chosen)
    with tempfile.TemporaryDirectory() as temporary:
        if args.scale == "tiny":
            args.out, args.results = Path(temporary), Path(temporary) / "results.json"
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(args.out / ".lock", timeout=0):
                tiny = args.scale == "tiny"
                commit, tree = (git("rev-parse", "HEAD"), ROOT) if tiny else checked_out(args.results, args.out)
                prepare_data(tree)
                campaign = Campaign(args.out, args.results, commit, tree, TINY if tiny else CPU)
                if args.speed:
                    campaign.results["speed"] = measure(campaign)
                    write_json(args.results, campaign.results)
                    return
                campaign.tune(args.jobs, {cell.config for cell, _ in wanted})
                campaign.train([run for run in wanted if args.scale != "tiny" or run[1] == SEEDS[0]], args.jobs)
        except Timeout:
            sys.exit(f"error: another process works in {args.out}; wait for it, or name another --out and --results")
        except ValueError as error:
            sys.exit(f"error: {error}")
    if args.results.resolve() == RESULTS.resolve():
        write(campaign.results)
    print(long_table(campaign.results))


if __name__ == "__main__":
    main()
