"""`train.py` on several ranks, as its user starts it."""

import base64
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.distributed.cells import TINY_ON_RANKS, free_port
from tests.processes import ROOT, Started, python

# DeepSpeed finds a GPU, as on a machine with one that the trainer leaves alone.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cuda"}
SETTINGS = [
    *TINY_ON_RANKS,
    "--data.micro_batch_size=2",
    "--data.global_batch_size=8",
    "--data.max_eval_windows=5",
    "--model.schedule.warmup_tokens=64",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.strategy=nlgmoe.ExpertParallelStrategy",
    "--trainer.strategy.init_args.expert_parallel_size=2",
]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def train_py(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return python(*launcher, "train.py", *args, env=ENVIRONMENT, timeout=300)


def test_lightning_starts_ranks_and_torchrun_resumes_what_they_saved(pocket_pile: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*SETTINGS, f"--data.data_dir={pocket_pile}", f"--trainer.default_root_dir={run}"]
    samples = "--trainer.callbacks.init_args.max_new_tokens=4"
    done = train_py("fit", *settings, samples, "--trainer.devices=2", "--model.train_tokens=1024")
    assert done.returncode == 0, done.stderr
    assert "blocks 1 of the model: 2 experts, expert-parallel degree 2, 1 a rank" in done.stderr + done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (4, 1024)
    assert len(list((run / "checkpoints" / "last.ckpt").glob("model-*"))) == 2
    assert (run / "samples.txt").read_text().count("---") == 6  # three prompts at two validations

    rest = ["--trainer.devices=2", "--model.train_tokens=1536", "--ckpt_path=last"]
    done = train_py("fit", *settings, samples, *rest, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


SWEEP = """
import sys
from nlgmoe import load_config

data, place, *folders = sys.argv[1:]
for folder in folders:
    experiment = load_config(
        "configs/quickstart.yaml",
        model__config__num_layers=4,
        model__config__moe__num_experts=[2, 4],
        model__config__hidden_size=32,
        model__config__seq_len=32,
        model__config__num_heads=2,
        data__data_dir=data,
        data__micro_batch_size=2,
        data__max_eval_windows=2,
        trainer__default_root_dir=folder,
        trainer__max_steps=2,
        trainer__callbacks=[],
        trainer__logger="MLFlowLogger",
        trainer__logger__tracking_uri=f"sqlite:///{place}/mlflow.db",
        trainer__logger__artifact_location=place,
        trainer__devices=2,
        trainer__strategy="nlgmoe.ExpertParallelStrategy",
        trainer__strategy__expert_parallel_size=2,
    )
    experiment.trainer.fit(experiment.module, experiment.data)
"""


def test_a_program_makes_several_runs_on_the_ranks_of_the_first(pocket_pile: Path, tmp_path: Path) -> None:
    program, folders = tmp_path / "sweep.py", [tmp_path / name for name in "ab"]
    program.write_text(SWEEP)
    done = python(str(program), *map(str, (pocket_pile, tmp_path, *folders)), env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    from mlflow.tracking import MlflowClient  # takes seconds to import

    assert (
        len(MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])) == 2
    )  # one for each run, not rank
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert first["steps"] == second["steps"] == 2 and first["val_loss"] == second["val_loss"]


def test_deepspeeds_launcher_on_two_nodes(pocket_pile: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hosts = base64.urlsafe_b64encode(json.dumps({"one": [0], "two": [0]}).encode()).decode()
    port = free_port()
    nodes = []
    for node in (0, 1):  # what `deepspeed --hostfile ... --no_local_rank train.py` starts on each node
        launcher = ["-m", "deepspeed.launcher.launch", f"--world_info={hosts}", f"--node_rank={node}"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={port}", "--no_local_rank"]
        settings = [*SETTINGS, f"--data.data_dir={pocket_pile}", f"--trainer.default_root_dir={run}"]
        settings += [
            "--trainer.devices=1",
            "--trainer.num_nodes=2",
            "--model.train_tokens=512",
            "--trainer.callbacks=[]",
        ]
        output = tmp_path / f"{node}.txt"
        nodes.append((Started([*launcher, "train.py", "fit", *settings], output, output, ENVIRONMENT), output))
    for started, output in nodes:
        assert started.wait(timeout=200) == 0, output.read_text()[-2000:]
    assert json.loads((run / "summary.json").read_text())["tokens"] == 512


SPOILT = [
    "--data.num_workers=1",
    "--model.optimizer.lr=1e39",
    "--model.non_finite.action=skip",
    "--trainer.callbacks.init_args.max_new_tokens=4",
    "--trainer.val_check_interval=100",
]


@pytest.mark.parametrize(
    ("launcher", "settings", "words"),
    [
        (
            (),
            ["--trainer.strategy.init_args.expert_parallel_size=3"],
            "size=3 is above the number of ranks",
        ),
        (TORCHRUN, SPOILT, "first not finite: the weight token_embedding.weight on all ranks; an earlier step"),
    ],
    ids=["a strategy that does not fit", "weights that are not finite"],
)
def test_an_error_of_all_ranks_is_one_line_of_each(
    launcher: tuple[str, ...], settings: list[str], words: str, pocket_pile: Path, tmp_path: Path
) -> None:
    place = [f"--data.data_dir={pocket_pile}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    done = train_py(
        *("fit", *SETTINGS, *place, "--trainer.devices=2", "--model.train_tokens=4096", *settings), launcher=launcher
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines and all(words in line for line in lines)
    assert done.returncode == (1 if launcher else 2)  # torchrun's, whatever its processes' are


@pytest.mark.parametrize("hangs", [False, True], ids=["raises", "hangs"])
def test_a_rank_brings_the_others_down_and_its_error_is_shown(pocket_pile: Path, tmp_path: Path, hangs: bool) -> None:
    done = train_py(
        "fit",
        *(*SETTINGS, f"--data.data_dir={pocket_pile}", f"--trainer.default_root_dir={tmp_path / 'run'}"),
        *("--trainer.devices=2", "--model.train_tokens=4096", "--trainer.callbacks=tests.distributed.cells.Raises"),
        *(f"--trainer.callbacks.init_args.hangs={str(hangs).lower()}",),
        f"--trainer.strategy.init_args.timeout_seconds={25 if hangs else 120}",  # bounds how far apart they start, too
    )
    assert done.returncode not in (0, None)
    assert ("rank 1 has had enough" in done.stderr) != hangs


STOPPED = """
import os, signal, sys
from nlgmoe.cli.train import main
from nlgmoe.module import MoEGPTModule
step = MoEGPTModule._token_losses
def losses(self, batch):
    if self.trainer.global_rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch)
MoEGPTModule._token_losses = losses
main(sys.argv[1:])
"""


def test_an_evaluation_that_is_told_to_stop_ends_at_once(pocket_pile: Path, tmp_path: Path) -> None:
    """Also where a rank waits for the others in each layer."""
    (script := tmp_path / "stopped.py").write_text(STOPPED)
    place = [f"--data.data_dir={pocket_pile}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    done = python(str(script), "validate", *SETTINGS, *place, "--trainer.devices=2", env=ENVIRONMENT)
    assert done.returncode == -signal.SIGTERM
    assert "Traceback" not in done.stderr
