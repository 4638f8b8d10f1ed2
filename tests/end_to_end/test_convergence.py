"""The comparison of two commits: that it trains with both, repeats no run, and judges the difference."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import convergence


def test_a_difference_between_two_commits_is_judged(pocket_pile: Path, tmp_path: Path) -> None:
    def compare() -> dict:
        convergence.main(["--against=HEAD", "--tiny", "--control", f"--data_dir={pocket_pile}", f"--out={tmp_path}"])
        return json.loads((tmp_path / "convergence.json").read_text())["control"]["precisions"]["fp32"]

    found = compare()
    assert abs(found["difference"]) < 1e-4 and found["losses"]["old"][0] == pytest.approx(8.3, abs=0.2)
    (other,) = tmp_path.glob("*-control-tiny")
    summary = json.loads((other / "summary.json").read_text())
    assert summary["steps"] == 2
    (other / "summary.json").write_text(json.dumps(summary | {"val_loss": summary["val_loss"] - 0.01}))
    with pytest.raises(SystemExit, match=r"a mean difference is above 0\.005 nats"):
        compare()
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=convergence.ROOT, capture_output=True, text=True).stdout
    assert str(tmp_path) not in worktrees and not list(tmp_path.glob("tree-*"))


def test_what_three_seeds_are_worth_by_hand() -> None:
    found = convergence.compare([1.0, 1.0, 1.0], [1.01, 1.0, 0.99])
    assert found["difference"] == pytest.approx(0)
    assert found["standard_error"] == pytest.approx(0.01 / 3**0.5)
    assert found["false_alarm"] == pytest.approx(0.3865, abs=1e-3)  # 0.005 is 0.866 standard errors
    assert convergence.compare([1.0], [1.0])["standard_error"] is None
