"""`make gpu`: compare results on one GPU with the CPU's, and measure speed.

    python -m benchmarks.gpu                          all steps, at most 17 minutes; docs/results/gpu.json and gpu.md
    python -m benchmarks.gpu --only parity waiting    some of them
    python -m benchmarks.gpu --dry-run                all steps at tiny shapes on the CPU, in this process

It needs no network and no installed nlgmoe: a copy of the repository, its dependencies and the tokenised text (docs/scaling.md).

Exit code: 0; 1 if a figure of correctness is missed, or a step fails or runs out of time; 2 if there is no GPU. Figures of speed
and memory are judged on an H100 or H200 and change no exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.run import Results, Run
from benchmarks.timing import RESULTS, ROOT, output_of, settings

STEPS = {  # the module of the function of that name, and its time limit in seconds
    "parity": ("correctness", 180),
    "waiting": ("speed", 80),
    "training": ("correctness", 240),
    "strategy": ("correctness", 150),
    "dense": ("speed", 150),
    "experts": ("speed", 180),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; return the exit code."""
    arguments = parse(argv)
    # Not `torch.cuda.init`: the allocator is set up after this, by `prepare_process`.
    if not arguments.dry_run and not torch.cuda.is_available():
        problem = "PyTorch without CUDA, no GPU, or an old driver"
        print(f"{problem}; make gpu DRY_RUN=1 runs every step at tiny shapes on the CPU", file=sys.stderr)
        return 2
    if arguments.step is not None:
        return perform(arguments.step, arguments, Results(Path(arguments.output)))
    steps = arguments.only or list(STEPS)
    if "training" in steps:
        make_text(Path(arguments.data))
    results = Results(None if arguments.output is None else Path(arguments.output), about(arguments))
    for name in steps:
        results = run_step(name, arguments, results)
    if results.path is not None:
        results.path.with_suffix(".md").write_text(results.page(), encoding="utf-8")
    return conclude(results)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, all in this process")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--output", help="file of the results; by default docs/results/gpu.json, in a dry run none")
    parser.add_argument("--data", default=str(ROOT / "data/pocket_pile"), help="folder of the tokenised text")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # of a step's process
    arguments = parser.parse_args(argv)
    if arguments.output is None and not arguments.dry_run:
        arguments.output = str(RESULTS / "gpu.json")
    return arguments


def make_text(folder: Path) -> None:
    """Make the pocket Pile, outside the time limits; without it only the step `training` fails."""
    from nlgmoe.data import PocketPile

    try:
        PocketPile().prepare(folder, "pocket-4k")
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "card": "cpu" if arguments.dry_run else torch.cuda.get_device_name(0),
        "driver": "none" if arguments.dry_run else output_of(query),
        "capability": None if arguments.dry_run else torch.cuda.get_device_capability(0),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        **settings(),
    }


def run_step(name: str, arguments: argparse.Namespace, results: Results) -> Results:
    """Run a step in its own process, or in a dry run in this one; return the results with its status."""
    started = time.monotonic()
    if arguments.dry_run:
        perform(name, arguments, results)
    else:
        command = [sys.executable, "-m", "benchmarks.gpu", "--step", name, "--output", arguments.output]
        outcome = limited([*command, "--data", arguments.data], STEPS[name][1])
        results = Results(results.path)  # with what the process has written
        if results.step(name)["status"] == "running":  # it was ended
            results.step(name)["status"] = outcome
    results.step(name)["seconds"] = round(time.monotonic() - started, 1)
    results.write()
    print(f"{name:<12} {results.step(name)['status']}, {results.step(name)['seconds']} s", flush=True)
    return results


def limited(command: Sequence[str], limit: float) -> str:
    """Run a command for at most `limit` seconds; return `done`, or how it failed."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            code = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"failed: not done after {limit:.0f} s"
    return "done" if code == 0 else f"failed: exit code {code}"


def perform(name: str, arguments: argparse.Namespace, results: Results) -> int:
    """Run a step in this process; return 1 if it fails. Without a package that it imports, it is not run."""
    step, device = results.step(name), torch.device("cpu" if arguments.dry_run else "cuda")
    run = Run(name, device, arguments.dry_run, Path(arguments.data), results)
    try:
        with TemporaryDirectory() as folder:
            getattr(importlib.import_module(f"benchmarks.gpu.{STEPS[name][0]}"), name)(run, Path(folder))
    except Exception as error:
        traceback.print_exc()
        kind = "not run" if isinstance(error, ModuleNotFoundError) else "failed"
        step["status"] = f"{kind}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    else:
        step["status"] = "done"
    results.write()
    return int(step["status"] != "done")


def conclude(results: Results) -> int:
    """Print missed figures and steps that failed or were not run; return the exit code."""
    steps = results.run["steps"]
    figures = [(f"{name}: {figure['name']}", figure) for name, step in steps.items() for figure in step["figures"]]
    missed = {
        kind: [name for name, figure in figures if figure["kind"] == kind and figure["met"] is False]
        for kind in ("correct", "goal")
    }
    ended = {
        kind: [f"{name} ({step['status']})" for name, step in steps.items() if step["status"].startswith(kind)]
        for kind in ("failed", "not run")
    }
    for title, names in {"wrong": missed["correct"], **ended, "goals missed": missed["goal"]}.items():
        if names:
            print(f"{title}: {'; '.join(names)}")
    judged = sum(figure["met"] is not None for _, figure in figures)
    met = sum(figure["met"] is True for _, figure in figures)
    done, where = (
        len(steps) - sum(map(len, ended.values())),
        "" if torch.cuda.is_available() else "dry run on the CPU: ",
    )
    print(f"{where}{met} of {judged} figures met; {done} of {len(steps)} steps done")
    return int(bool(missed["correct"] or ended["failed"]))


if __name__ == "__main__":
    sys.exit(main())
