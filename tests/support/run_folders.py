"""Small runs in a run folder, in a process of their own that may be killed at any file-system call."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping

from nlgmoe import SigmoidRouterConfig
from nlgmoe.callbacks import ExpertLoad, RunSummary, SaveCheckpoints
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import checkpoint_path
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.run.folder import RunCSVLogger, RunFolder
from nlgmoe.run.trainer import RunTrainer
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

CONFIG = GPTConfig(61, 16, 2, 16, 2, hidden_dropout=0.1, moe=MoEConfig(2, mlp_type="residual", noise="jitter"))
TOKENS = 4 * 16 * 2  # of a step
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "open")


def module(config: GPTConfig = CONFIG, **settings: Any) -> MoEGPTModule:
    schedule = LearningRateSchedule("cosine", min_lr=1e-4, warmup_tokens=2 * TOKENS, decay_tokens=20 * TOKENS)
    return MoEGPTModule(config, AdamWConfig(lr=1e-2), schedule, **settings)


def make_trainer(folder: Path, *callbacks: Callback, save: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    """Validates every 4 steps, saves every 3 and before validations, and logs every step."""
    parser: Any = SimpleNamespace(dump=lambda config, **_: json.dumps(config.as_dict()))
    keeper = [SaveCheckpoints(**({"every_n_steps": 3} | save))] if save is not None else []
    defaults = QUIET | {"max_steps": 10, "accumulate_grad_batches": 2, "val_check_interval": 4, "accelerator": "cpu"}
    defaults |= {"logger": RunCSVLogger(folder), "enable_checkpointing": bool(keeper), "log_every_n_steps": 1}
    return RunTrainer(
        default_root_dir=folder,
        callbacks=[*keeper, ExpertLoad(), RunSummary(), RunFolder(parser, Namespace()), *callbacks],  # type: ignore[arg-type]
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        **(defaults | settings),
    )


def fit(folder: Path, *callbacks: Callback, ckpt_path: Any = "auto", of: Any = None, **settings: Any) -> Trainer:
    """Train in `folder`; `save` has other settings of its `SaveCheckpoints`, `of` those of the module."""
    trainer = make_trainer(folder, *callbacks, **({"save": {}} | settings))
    trainer.fit(module(**(of or {})), datamodule=SyntheticData(), ckpt_path=ckpt_path)
    return trainer


def in_process(job: Callable[[], Any], kill_at: int | None = None, folder: Path | None = None) -> int:
    """Run `job` in a forked process, and kill it at its call number `kill_at` that changes or opens a file of `folder`.

    Returns:
        The exit code, -9 if it was killed; without `kill_at` the number of such calls.
    """
    counter, child = os.pipe(), os.fork()
    if child == 0:
        calls = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal calls
            if event in EVENTS and arguments and str(folder) in str(arguments[0]):
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            torch.set_num_threads(1)
            if folder is not None:
                sys.addaudithook(hook)
            job()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os.write(counter[1], calls.to_bytes(4, "little"))
            os._exit(code)
    os.close(counter[1])
    _, status = os.waitpid(child, 0)
    counted = os.read(counter[0], 4)
    os.close(counter[0])
    code = os.waitstatus_to_exitcode(status)
    return int.from_bytes(counted, "little") if kill_at is None and folder is not None else code


def outcome(folder: Path, step: int = 10) -> dict[str, Any]:
    """What a run left: weights, moments, tables, summary, links and the list of files; without times."""
    path = checkpoint_path(folder, step)
    stored = {kind: Checkpoint(path).tensors(kind).read_all() for kind in ("model", "optimizer")}
    tensors = {f"{kind}/{name}": value for kind, values in stored.items() for name, value in values.items()}
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("tokens_per_second", "peak_memory_bytes", "wall_seconds", "step_seconds", "validation_seconds"):
        summary.pop(name)
    links = {link.name: os.readlink(link) for link in (folder / "checkpoints").glob("*.ckpt") if link.is_symlink()}
    return {
        "tensors": tensors,
        "metrics.csv": (folder / "metrics.csv").read_text(),
        "expert_load.csv": (folder / "expert_load.csv").read_text(),
        "summary": summary,
        "links": links,
        "files": sorted(str(file.relative_to(folder)) for file in folder.rglob("*")),
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        if name != "tensors":
            assert found[name] == expected[name], name
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, value in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], value), name


SETTINGS: dict[str, dict[str, Any]] = {
    "saves before validations": {},
    "saves by steps alone": {"save": {"save_before_validation": False, "keep": 1}},
    "milestones": {"save": {"every_n_steps": None, "milestones": 4, "keep": 1, "monitor": None}},
    "curriculum": {"of": {"curriculum": SequenceCurriculum(8 * TOKENS, 8, 4)}},
    "a router that learns from steps": {
        "of": {"config": replace(CONFIG, moe=MoEConfig(4, token_dropping=False, router=SigmoidRouterConfig(0.1)))}
    },
    "early stopping": {"stops": True, "max_steps": 100},
}


def run(folder: Path, *callbacks: Callback, stops: bool = False, **settings: Any) -> Trainer:
    """Train; with `stops`, `EarlyStopping` ends the run at step 12."""
    stopping = [EarlyStopping("val/loss", min_delta=100, patience=2)] if stops else []
    return fit(folder, *stopping, *callbacks, **settings)


class Send(Callback):
    def __init__(self, hook: str, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.numbers:
            for number in self.numbers:
                os.kill(os.getpid(), number)
            self.numbers = ()
