"""The programs of docs/recipes.md, with a tiny model."""

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from nlgmoe.commands.main import main
from tests.support.commands import TINY

ROOT = Path(__file__).parents[1]
SHELL, OPTUNA, SENTENCE, CALLBACK, OWN = re.findall(
    r"^```(?:sh|python|yaml)\n(.*?)^```$", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE | re.DOTALL
)
SHORT = [*TINY, "--model.train_tokens=512", "--trainer.callbacks.init_args.max_new_tokens=8"]


def test_recipes_of_the_docs_run(
    pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    short = [*SHORT, f"--data.data_dir={pocket_pile}"]

    shown = subprocess.run(
        ["bash", "-euc", "nlgmoe() { printf '%s\\n' \"$@\" ''; }\n" + SHELL], capture_output=True, text=True, check=True
    )
    *fits, report = (call.splitlines() for call in shown.stdout.strip().split("\n\n"))
    assert [fit[0] for fit in fits] == ["fit"] * 3 and report[0] == "report"
    for command in (fits[0], fits[0], fits[1]):
        main([*command, *short])
    main(["report", *(f"runs/sweep/lr-{lr}" for lr in ("1e-3", "2e-3")), *report[2:]])
    assert "lr-2e-3" in Path("runs/sweep/report.html").read_text()

    Path("used_experts.py").write_text(CALLBACK)
    Path("own.yaml").write_text(OWN)
    main(["fit", "--config=configs/quickstart.yaml", *SHORT, f"--data.data_dir={pocket_pile}", "--config=own.yaml"])
    logged = pd.read_csv("runs/quickstart/metrics.csv")["used_experts/0"].dropna()
    assert len(logged) and (logged > 0).all() and any(Path("logs").rglob("events.out.tfevents*"))

    capsys.readouterr()
    exec(SENTENCE, {})
    assert "' king' [" in capsys.readouterr().out
