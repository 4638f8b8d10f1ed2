"""An installed wheel, outside the repository."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.support.commands import TINY

ROOT = Path(__file__).parents[2]


def test_a_wheel_copies_its_configurations_and_trains(pocket_pile: Path, tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = set(listed.splitlines())
    for name in tracked:  # a copy: setuptools builds in the folder itself
        (copy := tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy, follow_symlinks=False)
    (here := tmp_path / "empty").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def python(*words: str | Path) -> str:
        done = subprocess.run([sys.executable, *words], cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # The wheel is built from the source distribution.
    python("-m", "build", "--no-isolation", "--outdir", tmp_path, tmp_path / "source")
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    python("-m", "twine", "check", "--strict", wheel, sdist)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked - packed if not name.startswith(".")} == set()
    python("-m", "pip", "--quiet", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    nlgmoe = ("-m", "nlgmoe")
    assert str(tmp_path / "site") in python("-c", "import nlgmoe; print(nlgmoe.__file__)")
    assert len(python(*nlgmoe, "configs", "list").splitlines()) == len(list((ROOT / "configs").rglob("*.yaml")))
    python(*nlgmoe, "configs", "copy", "quickstart.yaml")
    assert [path.name for path in here.rglob("*")] == ["configs", "quickstart.yaml"]
    settings = [*TINY, f"--data.data_dir={pocket_pile}", "--trainer.max_steps=3"]
    callbacks = "--trainer.callbacks=null"  # no report, no samples
    python(*nlgmoe, "fit", "--config", "configs/quickstart.yaml", *settings, callbacks)
    assert json.loads((here / "runs/quickstart/summary.json").read_text())["steps"] == 3
