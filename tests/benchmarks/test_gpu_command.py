"""`make gpu`: a dry run of all of its steps, its judgement of figures, and what ends a step. The rest needs a GPU."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import STEPS, conclude, limited, parse, run_step
from benchmarks.gpu.run import Results, Run
from tests.support.processes import python

NEEDS_A_GPU = ("waits", "losses off fp32 without the strategy, ZeRO 1, fp16")


def test_gpu_command_takes_every_step_in_a_dry_run(tmp_path: Path, pocket_pile: Path) -> None:
    output = tmp_path / "gpu.json"
    done = python("-m", "benchmarks.gpu", "--dry-run", "--output", str(output), "--data", str(pocket_pile))
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(output.read_text())
    assert {"card", "driver", "torch", "commit", "command", "versions"} <= run.keys()
    assert list(run["steps"]) == list(STEPS)
    for name, step in run["steps"].items():
        assert step["status"] == "done" and step["figures"], name
        for figure in step["figures"]:
            judged = figure["kind"] == "correct" and not figure["name"].startswith(NEEDS_A_GPU)
            assert figure["met"] is (True if judged else None), figure  # no speed is judged on a CPU
    assert sum(figure["met"] is True for step in run["steps"].values() for figure in step["figures"]) > 40
    page = output.with_suffix(".md").read_text()
    assert run["commit"] in page and "| strategy | losses off fp32 without the strategy, ZeRO 2, bf16 | " in page


def test_gpu_command_does_not_run_a_step_whose_packages_do_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.speed", None)  # its import fails, as without DeepSpeed
    results = run_step("dense", parse(["--dry-run"]), Results(None, {}))
    assert results.step("dense")["status"].startswith("not run: ModuleNotFoundError: ")
    assert conclude(results) == 0


def test_gpu_command_ends_a_step_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "still here"
    child = f"import time, pathlib; time.sleep(1); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert limited([sys.executable, "-c", code], 0.5).startswith("failed: not done after")
    time.sleep(1.2)
    assert not mark.exists()
    assert limited([sys.executable, "-c", "raise SystemExit(3)"], 60) == "failed: exit code 3"
    assert limited([sys.executable, "-c", ""], 60) == "done"


@pytest.mark.parametrize(
    ("kind", "value", "met", "code"),  # of a figure that may be at most 1.0; the exit code of `make gpu`
    [
        ("correct", 1.0, True, 0),
        ("correct", 1.1, False, 1),
        ("correct", float("nan"), False, 1),
        ("correct", None, False, 1),  # only a dry run may leave a figure open
        ("goal", 1.1, False, 0),
    ],
)
def test_gpu_command_judges_figures(
    kind: str, value: Any, met: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "card", "NVIDIA H100 80GB HBM3")
    results = Results(None, {})
    run = Run("step", None, False, Path(), results)  # type: ignore[arg-type]
    if kind == "correct":
        run.correct("a figure", value, 1.0)
    else:
        run.goal("a figure", value, at_most=1.0)
    assert [figure["met"] for figure in results.step("step")["figures"]] == [met]
    results.step("step")["status"] = "done"
    assert conclude(results) == code
    results.step("parity")["status"] = "failed: exit code 1"
    assert conclude(results) == 1
