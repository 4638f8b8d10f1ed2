"""The path of docs/real_model.md with the real model: nightly."""

from pathlib import Path

from benchmarks import real_model


def test_real_model_takes_all_its_steps(tmp_path: Path) -> None:
    assert real_model.main(["--folder", str(tmp_path / "real_model")]) == 0
