"""SIGTERM to the one process that the user knows of."""

import csv
import json
from pathlib import Path

import psutil

from nlgmoe.cli.train import main
from tests.support.commands import SETTINGS_ON_RANKS, train_py


def test_two_ranks_stop_on_a_signal_and_one_process_goes_on(pocket_pile: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rest = [f"--data.data_dir={pocket_pile}", f"--trainer.default_root_dir={run}", "--model.train_tokens=1280"]
    rest += ["--trainer.callbacks.init_args.max_new_tokens=4"]  # of the last callback so far, SampleText
    stops = ["--trainer.devices=2", "--data.num_workers=1", "--trainer.callbacks+=tests.support.disturbances.TellsMain"]
    done = train_py("fit", *SETTINGS_ON_RANKS, *rest, *stops)
    assert done.returncode == 0, done.stderr
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(run) in str(each.info["cmdline"])]
    told = [line for line in done.stderr.splitlines() if line.startswith("SIGTERM: ended after step ")]
    (steps,) = (int(line.split(",")[0].split()[-1]) for line in told)
    assert steps in (3, 4) and told[0].endswith(f"checkpoints/step-{steps}.ckpt; resume with --ckpt_path last")
    assert not (run / "summary.json").exists()
    settings = [setting for setting in SETTINGS_ON_RANKS if "strategy" not in setting]
    main(["fit", *settings, *rest, "--trainer.devices=1", "--ckpt_path=last"])
    assert json.loads((run / "summary.json").read_text())["steps"] == 5
    with (run / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == [0, 1, 2, 3, 4]
