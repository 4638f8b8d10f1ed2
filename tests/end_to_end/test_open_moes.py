"""The commands of docs/open_moes.md, on the tiny random model that they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^    ((?:python|nlgmoe) .*)$", (ROOT / "docs/open_moes.md").read_text(), re.MULTILINE)
LEFT_OUT = ("configs/pr_moe", "allenai/")  # another model's; a hub's


@pytest.fixture(scope="module")
def walked(pocket_pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    for name in ("train.py", "docs", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / "data/pocket_pile").symlink_to(pocket_pile)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        if any(words in command for words in LEFT_OUT):
            continue
        program, *words = shlex.split(command)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", "nlgmoe"]
        done = subprocess.run([*start, *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return folder


def test_commands_of_the_open_moes_page_leave_what_it_says(walked: Path) -> None:
    assert (walked / "tiny/report.html").exists() and (walked / "tiny/checkpoints/step-10.ckpt").exists()
    assert (walked / "pruned/summary.json").exists() and (walked / "tiny_student_2/summary.json").exists()
    pruned = AutoModelForCausalLM.from_pretrained(walked / "pruned_olmoe")
    assert type(pruned).__name__ == "OlmoeForCausalLM" and pruned.config.num_experts == 6
