"""Train the models of the paper's claims, and answer the questions about them: `make reproduce`.

    python -m benchmarks.reproduce [--question KEY ...] [--jobs 2]   train what is missing, then write page and figures
    python -m benchmarks.reproduce --tables                          write page and figures from docs/results/reproduce.json
    python -m benchmarks.reproduce --speed                           time a training step of each model; on a quiet machine
    python -m benchmarks.reproduce --again                           train short runs with the code of that commit and of HEAD
    python -m benchmarks.reproduce --scale tiny                      twenty steps a run, into a temporary folder
    python -m benchmarks.reproduce --scale gpu                       estimate the hours of the same questions on one GPU

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

from benchmarks.reproduce.again import train_again
from benchmarks.reproduce.campaign import CPU, TINY, Campaign
from benchmarks.reproduce.cells import SEEDS
from benchmarks.reproduce.questions import LARGER, QUESTIONS, runs_of
from benchmarks.reproduce.speed import measure
from benchmarks.reproduce.tables import long_table, write
from benchmarks.runs import ROOT, git
from nlgmoe.files import write_json
from nlgmoe.hardware import hardware
from nlgmoe.model.counting import count_parameters
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.inspect_config import layout, read_settings

RESULTS, AGAIN = ROOT / "docs/results/reproduce.json", ROOT / "docs/results/reproduce_again.json"
ON_GPU = ("dense/125m_dense", "moe/125m_moe_64", "dense/350m_dense", "moe/350m_moe_128", "pr_moe/350m_pr_moe_32_64")
TOKENS_PER_PARAMETER = 20


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


def print_gpu_estimates(gpu: str = "h100") -> None:
    """Print the hours of each model on one GPU, for 20 tokens per active parameter."""
    print(
        f"{'configuration':<28} {'active':>8} {'tokens':>8} {'memory':>8} {'hours a run':>12}   one {gpu}, bf16, estimated"
    )
    for name in ON_GPU:
        model, settings = read_settings([str(ROOT / f"configs/{name}.yaml"), str(ROOT / "configs/hardware/gpu.yaml")])
        cost = estimate(model, layout(settings, {"gpus": 1}), hardware(gpu))
        active = count_parameters(model).active
        hours = TOKENS_PER_PARAMETER * active / cost.tokens_per_second / 3600
        memory = f"{cost.memory.total / 1e9:.0f} GB" + ("" if cost.fits else "!")
        print(
            f"{name:<28} {active / 1e6:>7.0f}M {TOKENS_PER_PARAMETER * active / 1e9:>7.1f}B {memory:>8} {hours:>12.1f}"
        )
    print(
        "!: does not fit; divide the experts over more GPUs. Seeds, claims and statistics are those of the small runs."
    )


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", nargs="*", choices=[question.key for question in (*QUESTIONS, *LARGER)],
                        help="default: all but those at the larger size")  # fmt: skip
    parser.add_argument("--scale", choices=["cpu", "tiny", "gpu"], default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/reproduce", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="train nothing")
    parser.add_argument("--speed", action="store_true", help="train nothing; time a step of each model, one thread")
    parser.add_argument("--again", action="store_true", help="compare short runs of both commits' code")
    args = parser.parse_args()
    if args.scale == "gpu":
        print_gpu_estimates()
        return
    if args.tables:
        write(json.loads(args.results.read_text()))
        return
    if args.again:
        commit, tree = checked_out(args.results, args.out.resolve())
        for folder in (tree, ROOT):
            prepare_data(folder)
        with tempfile.TemporaryDirectory() as out:
            print(train_again({commit: tree, git("rev-parse", "HEAD"): ROOT}, Path(out), AGAIN, args.jobs))
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
                found = (
                    (git("rev-parse", "HEAD"), ROOT) if args.scale == "tiny" else checked_out(args.results, args.out)
                )
                prepare_data(found[1])
                campaign = Campaign(args.out, args.results, *found, TINY if args.scale == "tiny" else CPU)
                if args.speed:
                    campaign.results["speed"] = measure(campaign)
                    write_json(args.results, campaign.results)
                    return
                campaign.tune(args.jobs, {cell.config for cell, _ in wanted})
                campaign.train([run for run in wanted if args.scale != "tiny" or run[1] == SEEDS[0]], args.jobs)
        except Timeout:
            sys.exit(f"error: another process works in {args.out}; wait for it, or name another --out and --results")
        except (ValueError, RuntimeError) as error:
            sys.exit(f"error: {error}")
    if args.scale == "cpu":
        write(campaign.results)
    print(long_table(campaign.results))


if __name__ == "__main__":
    main()
