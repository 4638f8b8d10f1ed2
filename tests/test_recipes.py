"""Programs of the guides, with a tiny model."""

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from nlgmoe.commands.main import main
from tests.support.commands import TINY

ROOT = Path(__file__).parents[1]
SHORT = [*TINY, "--model.train_tokens=512", "--trainer.callbacks.init_args.max_new_tokens=8"]


def block(page: str, words: str) -> str:
    """Return the fenced block of a guide that contains `words`."""
    blocks = re.findall(r"^```(?:sh|python|yaml)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    (found,) = (text for text in blocks if words in text)
    return found


def test_programs_of_the_guides_run(
    pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("short.yaml").write_text(block("tutorial.md", "train_tokens"))
    short = [*SHORT, f"--data.data_dir={pocket_pile}"]

    shown = subprocess.run(
        ["bash", "-euc", "nlgmoe() { printf '%s\\n' \"$@\" ''; }\n" + block("tutorial.md", "for lr in")],
        capture_output=True,
        text=True,
        check=True,
    )
    *fits, report = (call.splitlines() for call in shown.stdout.strip().split("\n\n"))
    assert [fit[0] for fit in fits] == ["fit"] * 3 and report[0] == "report"
    for command in (fits[0], fits[0], fits[1]):
        main([*command, *short])
    main(["report", *(f"runs/sweep/lr-{lr}" for lr in ("5e-3", "1e-2")), *report[2:]])
    assert "lr-1e-2" in Path("runs/sweep/report.html").read_text()

    Path("used_experts.py").write_text(block("extending.md", "class UsedExperts"))
    Path("own.yaml").write_text(block("extending.md", "used_experts.UsedExperts"))
    run = "runs/paper/seed-0"
    main(["fit", "--config=configs/quickstart.yaml", *short, "--config=own.yaml", f"--trainer.default_root_dir={run}"])
    logged = pd.read_csv(f"{run}/metrics.csv")["used_experts/0"].dropna()
    assert len(logged) and (logged > 0).all() and any(Path("logs").rglob("events.out.tfevents*"))

    capsys.readouterr()
    exec(block("tutorial.md", "load_pretrained"), {})
    assert "' king' [" in capsys.readouterr().out
