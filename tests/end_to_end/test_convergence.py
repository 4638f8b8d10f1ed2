"""The comparison of two commits: that it trains with both, repeats no run, and judges the difference."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import convergence


def test_a_difference_between_two_commits_is_judged(
    pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare() -> dict:
        places = [f"--{name}={tmp_path / name}" for name in ("out", "results")]
        words = ["--against=HEAD", "--tiny", "--control", "--precisions=fp32", f"--data_dir={pocket_pile}", *places]
        monkeypatch.setattr(sys, "argv", ["convergence", *words])
        convergence.main()
        return json.loads((tmp_path / "results").read_text())["control"]["precisions"]["fp32"]

    found = compare()
    assert abs(found["validation"]["difference"]) < 1e-4 and found["old"][0]["training"] == pytest.approx(8.3, abs=0.2)
    (other,) = (tmp_path / "out").glob("*-control-tiny")
    summary = json.loads((other / "summary.json").read_text())
    assert summary["steps"] == 2
    (other / "summary.json").write_text(json.dumps(summary | {"val_loss": summary["val_loss"] - 0.01}))
    with pytest.raises(SystemExit) as end:
        compare()
    assert end.value.code == 1 and "above 0.005 nats" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("tree-*"))


def test_what_three_seeds_are_worth_by_hand() -> None:
    runs = [
        [{"validation": loss, "training": 2.0} for loss in losses] for losses in ((1.0, 1.0, 1.0), (1.01, 1.0, 0.99))
    ]
    found = convergence.compare(*runs)
    assert found["validation"]["difference"] == pytest.approx(0)
    assert found["validation"]["standard_error"] == pytest.approx(0.01 / 3**0.5)
    assert found["validation"]["false_alarm"] == pytest.approx(0.3865, abs=1e-3)  # 0.005 is 0.866 standard errors
    assert found["training"]["false_alarm"] == 0
