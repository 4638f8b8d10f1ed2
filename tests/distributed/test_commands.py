"""`train.py` on several ranks, as its user starts it."""

import base64
import json
import signal
from pathlib import Path

import psutil
import pytest

from nlgmoe.cli.train import main
from tests.support.commands import ENVIRONMENT, SETTINGS_ON_RANKS, metrics_of, rows_of, train_py
from tests.support.processes import Started
from tests.support.spawn import free_port

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
FEW = "--trainer.callbacks.init_args.max_new_tokens=4"  # of the last callback so far, SampleText


def settings_of(run: Path, data: Path, *others: str) -> list[str]:
    return [*SETTINGS_ON_RANKS, f"--data.data_dir={data}", f"--trainer.default_root_dir={run}", *others]


def test_lightning_launches_ranks_and_torchrun_resumes_what_they_saved(pocket_pile: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = settings_of(run, pocket_pile, FEW, "--trainer.devices=2")
    done = train_py("fit", *settings, "--model.train_tokens=1024")
    assert done.returncode == 0, done.stderr
    said = done.stderr + done.stdout
    assert "expert-parallel degree of each MoE block of the model: {1: 2, 3: 2}" in said
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (4, 1024)
    assert len(list((run / "checkpoints" / "last.ckpt").glob("model-*"))) == 2
    assert said.count("--- '") == 3  # the prompts, on one rank
    done = train_py("fit", *settings, "--model.train_tokens=1536", "--ckpt_path=last", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


def test_deepspeeds_launcher_trains_on_two_nodes(pocket_pile: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hosts = base64.urlsafe_b64encode(json.dumps({"one": [0], "two": [0]}).encode()).decode()
    port = free_port()
    nodes = []
    for node in (0, 1):  # what `deepspeed --hostfile ... --no_local_rank train.py` starts on each node
        launcher = ["-m", "deepspeed.launcher.launch", f"--world_info={hosts}", f"--node_rank={node}"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={port}", "--no_local_rank"]
        two_nodes = ("--trainer.devices=1", "--trainer.num_nodes=2")
        settings = settings_of(run, pocket_pile, *two_nodes, "--model.train_tokens=512", "--trainer.callbacks=[]")
        output = tmp_path / f"{node}.txt"
        nodes.append((Started([*launcher, "train.py", "fit", *settings], output, output, ENVIRONMENT), output))
    for started, output in nodes:
        assert started.wait(timeout=200) == 0, output.read_text()[-2000:]
    assert json.loads((run / "summary.json").read_text())["tokens"] == 512


def test_an_error_of_all_ranks_is_one_line_of_each(pocket_pile: Path, tmp_path: Path) -> None:
    """The first step makes the weights infinite, and its gradient was finite."""
    spoilt = ["--model.optimizer.lr=1e39", "--model.optimizer.muon=null", "--model.non_finite.action=skip", FEW]
    spoilt += ["--trainer.val_check_interval=100", "--trainer.devices=2", "--model.train_tokens=4096"]
    done = train_py("fit", *settings_of(tmp_path / "run", pocket_pile, *spoilt), launcher=TORCHRUN)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines and done.returncode == 1
    assert all("first not finite: the weight token_embedding.weight on all ranks" in line for line in lines), lines


@pytest.mark.parametrize("hangs", [False, True], ids=["raises", "hangs"])
def test_rank_that_fails_or_hangs_ends_the_others_and_its_error_is_shown(
    pocket_pile: Path, tmp_path: Path, hangs: bool
) -> None:
    fails = ["--trainer.callbacks=tests.support.disturbances.Raises", f"--trainer.callbacks.init_args.hangs={hangs}"]
    fails += ["--trainer.devices=2", "--model.train_tokens=4096"]
    seconds = 25 if hangs else 120  # it bounds how far apart they start, too
    fails += [f"--trainer.strategy.init_args.timeout_seconds={seconds}"]
    done = train_py("fit", *settings_of(tmp_path / "run", pocket_pile, *fails))
    assert done.returncode not in (0, None)
    assert ("rank 1 has had enough" in done.stderr) != hangs


def test_two_ranks_stop_on_sigterm_to_the_one_process_that_the_user_knows_and_one_process_goes_on(
    pocket_pile: Path, tmp_path: Path
) -> None:
    run, stops = tmp_path / "run", "--trainer.callbacks+=tests.support.disturbances.TellsMain"
    settings = settings_of(run, pocket_pile, "--model.train_tokens=1280", FEW)
    done = train_py("fit", *settings, "--trainer.devices=2", "--data.num_workers=1", stops)
    assert done.returncode == 0, done.stderr
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(run) in str(each.info["cmdline"])]
    told = [line for line in done.stderr.splitlines() if line.startswith("SIGTERM: ended after step ")]
    (steps,) = (int(line.split(",")[0].split()[-1]) for line in told)
    assert steps in (3, 4) and told[0].endswith(f"checkpoints/step-{steps}.ckpt; resume with --ckpt_path last")
    assert not (run / "summary.json").exists()
    alone = [setting for setting in settings if "strategy" not in setting]
    main(["fit", *alone, "--trainer.devices=1", "--ckpt_path=last"])
    assert json.loads((run / "summary.json").read_text())["steps"] == 5
    assert [int(row["step"]) for row in rows_of(run / "metrics.csv") if row["train/loss"]] == [0, 1, 2, 3, 4]


def test_two_ranks_killed_while_they_save_go_on_as_if_undisturbed(pocket_pile: Path, tmp_path: Path) -> None:
    run, undisturbed, output = tmp_path / "run", tmp_path / "undisturbed", tmp_path / "output.txt"
    others = (FEW, "--trainer.devices=2", "--model.train_tokens=1536", "--ckpt_path=auto")
    killed = ["fit", *settings_of(run, pocket_pile, *others)]
    kills = "--trainer.callbacks+=tests.support.disturbances.KillsAllInASave"
    started = Started(["train.py", *killed, kills], output, output, ENVIRONMENT, new_session=True)
    assert started.wait(timeout=200) == -signal.SIGKILL, output.read_text()[-2000:]
    assert (run / "checkpoints/.step-4.ckpt.writing").exists()
    resumed = train_py(*killed)
    assert resumed.returncode == 0 and "step-2.ckpt" in resumed.stdout + resumed.stderr, resumed.stderr
    assert not list(run.rglob(".*.ckpt.*"))
    done = train_py("fit", *settings_of(undisturbed, pocket_pile, *others))
    assert done.returncode == 0, done.stderr
    for row, expected in zip(metrics_of(run), metrics_of(undisturbed), strict=True):
        assert row == pytest.approx(expected, rel=1e-6, nan_ok=True)
