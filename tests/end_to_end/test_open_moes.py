"""The commands of docs/open_moes.md, on the tiny random model that they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^    ((?:python|nlgmoe) .*)$", (ROOT / "docs/open_moes.md").read_text(), re.MULTILINE)
LEFT_OUT = ("configs/pr_moe", "allenai/")  # another model's; a hub's


def test_commands_of_the_open_moes_page_leave_what_it_says(pocket_pile: Path, tmp_path: Path) -> None:
    for name in ("train.py", "docs", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pocket_pile").symlink_to(pocket_pile)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        if any(words in command for words in LEFT_OUT):
            continue
        program, *words = shlex.split(command)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", "nlgmoe"]
        done = subprocess.run([*start, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    left = ("tiny-experts-open_moes/experts.html", "report.html", "tiny/checkpoints/step-10.ckpt")
    assert all((tmp_path / name).exists() for name in (*left, "pruned/summary.json", "tiny_student_2/summary.json"))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned_olmoe")
    assert type(pruned).__name__ == "OlmoeForCausalLM" and pruned.config.num_experts == 6
