"""`make gpu`: shows on a machine with one GPU that nlgmoe computes there what it computes on a CPU, and how fast.

    python -m benchmarks.gpu                        all steps, at most 850 seconds; docs/results/gpu.json
    python -m benchmarks.gpu --only parity layers   some of them
    python -m benchmarks.gpu --dry-run              all steps at tiny shapes on the CPU, in this process
    python -m benchmarks.gpu --record               the CPU run that the step `training` is held against (2 minutes)

It needs no network and no installed nlgmoe: a copy of the repository, its dependencies and the tokenised text (docs/gpu.md).

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
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.run import ROOT, Results, Run
from benchmarks.timing import output_of, settings

SECONDS = 850.0
"""Of a whole run."""


@dataclass(frozen=True)
class Step:
    """The function of its name in `benchmarks.gpu.NAME`: its time limit in seconds, and the packages that it needs."""

    limit: float
    needs: tuple[str, ...] = ()


STEPS = {
    "environment": Step(60),
    "parity": Step(110, ("pytest",)),
    "waiting": Step(60, ("lightning",)),
    "training": Step(130, ("lightning", "jsonargparse", "tokenizers")),
    "strategy": Step(110, ("lightning", "deepspeed")),
    "shapes": Step(240, ("lightning", "deepspeed")),
    "layers": Step(60, ("deepspeed",)),
    "decoding": Step(80),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; the exit code."""
    arguments = parse(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print(f"{why_no_gpu()}: make gpu DRY_RUN=1 runs every step at tiny shapes on the CPU", file=sys.stderr)
        return 2
    if arguments.record:
        from benchmarks.gpu.training import record

        record(Path(arguments.data))
        return 0
    results = Results(None if arguments.output is None else Path(arguments.output))
    if arguments.step is not None:
        return perform(arguments.step, arguments, results)
    steps = arguments.only or list(STEPS)
    if "training" in steps:
        make_text(Path(arguments.data))
    results.begin(about(arguments))
    deadline = time.monotonic() + SECONDS
    for name in steps:
        results = one(name, arguments, results, deadline)
    return conclude(results)


def why_no_gpu() -> str:
    """Why PyTorch finds no CUDA GPU."""
    if not (driver := output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])):
        return "no CUDA GPU here"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install one with it"
    return (
        f"PyTorch's CUDA {torch.version.cuda} cannot use this GPU with driver {driver.splitlines()[0]}; CUDA 13 needs driver 580 "
        "or newer, older ones a PyTorch from another index"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, all in this process")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--output", help="file of the results; by default docs/results/gpu.json, in a dry run none")
    parser.add_argument("--data", default=str(ROOT / "data/pocket_pile"), help="folder of the tokenised text")
    parser.add_argument("--record", action="store_true", help="write the recorded run of the step training anew")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # the one that this process is for
    arguments = parser.parse_args(argv)
    arguments.dry_run |= arguments.record
    if arguments.output is None and not arguments.dry_run:
        arguments.output = str(ROOT / "docs/results/gpu.json")
    return arguments


def make_text(folder: Path) -> None:
    """Make the pocket Pile before the clock starts, if it is not there; without it the step `training` fails, others go on."""
    from nlgmoe.data.pocket_pile import prepare

    try:
        prepare(folder, "pocket-4k")
    except ValueError as error:
        print(error, file=sys.stderr)


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    card, driver = "cpu", "none"
    if not arguments.dry_run:
        card = torch.cuda.get_device_name(0)
        query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = output_of(query)
    return {
        "card": card,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "dry_run": arguments.dry_run,
        **settings(),
    }


def one(
    name: str, arguments: argparse.Namespace, results: Results, deadline: float, processes: bool = False
) -> Results:
    """Run a step and write down how it ended; the results as they are then.

    It runs in a process of its own; in a dry run only if `processes` is set, as importing takes longer than all else there.
    """
    started = time.monotonic()
    lacking = results.runs[-1].get("missing", {})
    if unusable := [package for package in STEPS[name].needs if package in lacking]:
        results.step(name)["status"] = f"not run: {', '.join(unusable)} missing"
    elif arguments.dry_run and not processes:
        perform(name, arguments, results)
    else:
        command = [sys.executable, "-m", "benchmarks.gpu", "--step", name, "--output", arguments.output]
        command += ["--data", arguments.data, *(["--dry-run"] if arguments.dry_run else [])]
        outcome = limited(command, min(STEPS[name].limit, deadline - started))
        results = Results(results.path)  # with what the process has written
        if results.step(name)["status"] == "running":  # it was ended
            results.step(name)["status"] = outcome
    results.step(name)["seconds"] = round(time.monotonic() - started, 1)
    results.write()
    print(f"{name:<12} {results.step(name)['status']}, {results.step(name)['seconds']} s", flush=True)
    return results


def limited(command: Sequence[str], limit: float) -> str:
    """Run a command for at most `limit` seconds; `done`, or how it failed."""
    if limit <= 0:
        return "failed: no time was left"
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
    """Run a step in this process; 1 if it fails."""
    step = results.step(name)
    run = Run(
        name, torch.device("cpu" if arguments.dry_run else "cuda"), arguments.dry_run, Path(arguments.data), results
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            module = importlib.import_module(f"benchmarks.gpu.{name}")
            getattr(module, name)(run, Path(folder))
    except Exception as error:
        traceback.print_exc()
        step["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        step["status"] = "done"
    results.write()
    return int(step["status"] != "done")


def conclude(results: Results) -> int:
    """Print what was missed, not run and not judged; the exit code."""
    steps = results.runs[-1]["steps"]
    figures = [(name, figure) for name, step in steps.items() for figure in step["figures"]]
    wrong = [
        f"{name}: {figure['name']}"
        for name, figure in figures
        if figure["kind"] == "correct" and figure["met"] is False
    ]
    slow = [
        f"{name}: {figure['name']}" for name, figure in figures if figure["kind"] == "aim" and figure["met"] is False
    ]
    failed = [f"{name} ({step['status']})" for name, step in steps.items() if step["status"].startswith("failed")]
    absent = [f"{name} ({step['status']})" for name, step in steps.items() if step["status"].startswith("not run")]
    for title, names in (("wrong", wrong), ("failed", failed), ("not run", absent), ("aims missed", slow)):
        if names:
            print(f"{title}: {'; '.join(names)}")
    judged = sum(figure["met"] is not None for _, figure in figures)
    done = len(steps) - len(failed) - len(absent)
    print(f"{judged - len(wrong) - len(slow)} of {judged} figures met; {done} of {len(steps)} steps done")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
