"""An installed wheel, outside the repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.commands import TINY

ROOT = Path(__file__).parents[2]


def test_a_wheel_copies_its_configurations_and_trains(pocket_pile: Path, tmp_path: Path) -> None:
    for name in ("nlgmoe", "configs"):  # a copy: setuptools builds in the folder itself
        shutil.copytree(ROOT / name, tmp_path / "source" / name, True, shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    (here := tmp_path / "empty").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def python(*words: str | Path) -> str:
        done = subprocess.run([sys.executable, *words], cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = ("-m", "pip", "--quiet")
    python(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tmp_path / "source")
    (wheel,) = tmp_path.glob("*.whl")
    python(*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    nlgmoe = ("-m", "nlgmoe")
    assert str(tmp_path / "site") in python("-c", "import nlgmoe; print(nlgmoe.__file__)")
    assert len(python(*nlgmoe, "configs", "list").splitlines()) == len(list((ROOT / "configs").rglob("*.yaml")))
    python(*nlgmoe, "configs", "copy", "quickstart.yaml")
    assert [path.name for path in here.rglob("*")] == ["configs", "quickstart.yaml"]
    settings = [*TINY, f"--data.data_dir={pocket_pile}", "--trainer.max_steps=3"]
    callbacks = "--trainer.callbacks=null"  # no report, no samples
    python(*nlgmoe, "fit", "--config", "configs/quickstart.yaml", *settings, callbacks)
    assert json.loads((here / "runs/quickstart/summary.json").read_text())["steps"] == 3
