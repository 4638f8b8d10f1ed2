"""What runs on the fake accelerator, beside the same on the CPU; `python -m tests.accelerator.cells FILE` writes what happened.

Each cell is a function of `CELLS`; its result is JSON: what it returns, or the traceback that it ended with.
"""

import io
import json
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import StrategyRegistry

from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule, generate, load_config, ranks, step
from nlgmoe.callbacks import StagedDistillation
from nlgmoe.checkpoint.entries import split_experts
from nlgmoe.commands.main import main as command
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.distill.offline_teacher import OfflineTeacher
from nlgmoe.model.gpt import GPT
from nlgmoe.non_finite import NonFinite, NonFiniteError
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.surgery.warm_start import WarmStart
from nlgmoe.surgery.write_weights import write_weights
from tests.accelerator import fake
from tests.accelerator.training import CPU, FAKE, VARIANT_CELLS, Steps, Watched, config, make_trainer, on_both, train
from tests.support.checkpoints import TOKENIZER
from tests.support.corpora import write_tiny_corpus
from tests.support.distillation import record
from tests.support.synthetic import NumberedData

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs/examples"))


def dropout(root: Path) -> dict[str, Any]:
    """It draws from the device's generator, and again where blocks are recomputed."""
    model = config({}, hidden_dropout=0.2, attention_dropout=0.1)
    found, *_ = train(FAKE, "32-true", root, model)
    again, *_ = train(FAKE, "32-true", root, model, activation_checkpointing=True)
    without, *_ = train(FAKE, "32-true", root, config({}))
    return found | {"expected": again, "without": without["losses"]}


def teacher(root: Path) -> Path:
    *_, run, _ = train(CPU, "32-true", root, config({"num_experts": [2, 4], "mlp_type": "residual"}))
    run.save_checkpoint(root / "teacher.ckpt")
    return root / "teacher.ckpt"


def online_teacher(root: Path) -> dict[str, Any]:
    """Distillation ends after two steps; the teacher is in bf16."""
    distiller = MixtureOfStudents(str(teacher(root)), temperature=2.0, precision="bf16")
    return on_both("32-true", root, config({}), None, None, StagedDistillation(step=2), distiller=distiller)


def recorded_logits(root: Path) -> dict[str, Any]:
    """Recorded on the accelerator, learnt from on both."""
    path = teacher(root)
    record(path, root / "logits", device=FAKE, top_k=8, samples=12)
    distiller = OfflineTeacher(str(root / "logits"), temperature=2.0, teacher=str(path))
    return on_both("32-true", root, config({}), distiller=distiller)


def generation(root: Path) -> dict[str, Any]:
    """The most likely tokens, and drawn ones; prompts of several lengths."""
    prompts, texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], {}
    for device in (CPU, FAKE):
        model = GPT(config({"top_k": 2, "mlp_type": "residual"}), seed=3).to(device).eval()
        greedy = generate(model, prompts, 8, temperature=0.0)
        texts[device] = [*greedy, *generate(model, prompts, 8, temperature=1.5, top_k=20, top_p=0.9, stop_ids=[7])]
    return {"tokens": texts[FAKE], "expected": {"tokens": texts[CPU]}}


def measured_text(root: Path) -> dict[str, Any]:
    """The numbers that `prune` and `student` print, and whether the host has read any from the device."""
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 16, 6, 16, 2, init_std=0.3, moe=MoEConfig([6, 0, 5], top_k=2)))
    source, text, values = str(root / "whole.ckpt"), root / "text.txt", split_experts(model.state_dict())
    write_weights(source, values.__getitem__, model.config, TOKENIZER.files, origin="elsewhere")
    text.write_text("The king and the queen went to the town. " * 40)
    prune = ["prune", source, str(root / "small.ckpt"), "--num-experts=[3,0,4]", "--overwrite"]
    found: dict[str, dict[str, Any]] = {device: {} for device in ("cpu", fake.DEVICE)}
    for device, numbers in found.items():
        for words in (prune, ["student", source, "--num-layers=5", "--blocks=influence"]):
            fake.take_reads()
            with redirect_stdout(io.StringIO()) as said:
                command([*words, f"--text={text}", f"--device={device}"])
            numbers[words[0]] = [float(number) for number in re.findall(r"\d+\.\d+", said.getvalue())]
            numbers[f"{words[0]} read the device"] = fake.take_reads() != []
    return found[fake.DEVICE] | {
        "expected": found["cpu"] | {f"{name} read the device": True for name in ("prune", "student")}
    }


def checkpoints(root: Path) -> dict[str, Any]:
    """Saved on the accelerator; then resumed and started from, on both."""
    model, losses = config({"mlp_type": "residual"}), {}
    *_, run, _ = train(FAKE, "32-true", root, model)
    run.save_checkpoint(root / "saved.ckpt")
    for device in (CPU, FAKE):
        resumed = make_trainer(device, "32-true", root, steps := Steps(), max_steps=5)
        resumed.fit(MoEGPTModule(model, AdamWConfig(lr=1e-3)), NumberedData(), ckpt_path=root / "saved.ckpt")
        warm, *_ = train(device, "32-true", root, model, warm_start=WarmStart(str(root / "saved.ckpt")))
        losses[device] = [*torch.stack(steps.losses).tolist(), *warm["losses"]]
    return {"losses": losses[FAKE], "expected": {"losses": losses[CPU]}}


def one_of_two_ranks(root: Path) -> dict[str, Any]:
    """What a rank exchanges with one that has the same: losses and sizes, on the device."""
    two = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=lambda value: value.mul_(2))
    two.all_gather_into_tensor = lambda every, own: every.copy_(own.expand_as(every))
    accumulated = {"accumulate_grad_batches": 2}
    with mock.patch.object(ranks, "distributed", two), mock.patch.object(step, "distributed", two):
        found, _, made = train(FAKE, "32-true", root / "fake", config({}), None, accumulated)
    expected, _, alone = train(CPU, "32-true", root / "cpu", config({}), None, accumulated)
    return found | {"tokens": made.tokens_seen, "expected": expected | {"tokens": 2 * alone.tokens_seen}}


class Spoil(Callback):
    """NaN in one gradient of the second step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            weight = pl_module.get_parameter("model.blocks.1.moe.router.weight")
            handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * torch.nan)[1])


def non_finite(root: Path) -> dict[str, Any]:
    found = on_both("32-true", root, config({}), None, None, Spoil(), non_finite=NonFinite("skip"))
    try:
        train(FAKE, "32-true", root, config({}), None, None, Spoil())
    except NonFiniteError as error:
        return found | {"message": str(error)}
    raise AssertionError("the run went on")


WRITTEN = {"summary.json", "metrics.csv", "expert_load.csv", "specialisation.safetensors", "samples.txt", "report.html"}


def quickstart(root: Path) -> dict[str, Any]:
    """`train.py fit`, `validate` and `predict` as `configs/quickstart.yaml` has them, with a smaller model and less data."""
    (root / "corpus").mkdir()
    write_tiny_corpus(root / "corpus")
    trainer = {"accelerator": fake.DEVICE, "strategy": fake.DEVICE, "default_root_dir": str(root / "run")}
    trainer |= {"val_check_interval": 3, "log_every_n_steps": 2}
    trainer |= {"callbacks__init_args__max_new_tokens": 8}  # of the last one in the file
    parts: dict[str, dict[str, Any]] = {
        "model__config": {"num_layers": 2, "moe__num_experts": [4], "hidden_size": 32, "seq_len": 32},
        "model": {"train_tokens": 7 * 2 * 32, "schedule__warmup_tokens": 64},
        "trainer": trainer,
        "data": {"data_dir": str(root / "corpus"), "tokenizer": str(root / "corpus/tokenizer")}
        | {"micro_batch_size": 2, "max_eval_windows": 4},
    }
    settings = {f"{part}__{name}": value for part, values in parts.items() for name, value in values.items()}
    experiment, steps = load_config(ROOT / "configs" / "quickstart.yaml", **settings), Steps()
    experiment.trainer.callbacks = [steps, *experiment.trainer.callbacks]  # type: ignore[attr-defined]
    experiment.trainer.fit(experiment.module, experiment.data)
    summary = json.loads((root / "run" / "summary.json").read_text())
    again = load_config(ROOT / "configs" / "quickstart.yaml", **settings)
    checkpoint = root / "run" / "checkpoints" / "last.ckpt"
    (validated,) = again.trainer.validate(again.module, again.data, ckpt_path=checkpoint, verbose=False)
    again.trainer.predict(again.module, again.data, ckpt_path=checkpoint)
    return {
        "reads": steps.reads,
        "validation": validated["val/loss"],
        "expected": {"validation": summary["val_loss"]},
        "missing": sorted((WRITTEN | {"predictions.safetensors"}) - {path.name for path in (root / "run").iterdir()}),
    }


CELLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **VARIANT_CELLS,
    "dropout": dropout,
    "online teacher in bf16 of a student in fp32": online_teacher,
    "one of two ranks": one_of_two_ranks,
    "recorded logits": recorded_logits,
    "generation": generation,
    "measured text": measured_text,
    "checkpoints": checkpoints,
    "steps that are not finite": non_finite,
    "quickstart": quickstart,
}


def main(file: str, *names: str) -> None:
    fake.install()
    AcceleratorRegistry.register(fake.DEVICE, fake.FakeAccelerator)
    StrategyRegistry.register(fake.DEVICE, Watched, device=FAKE, accelerator=fake.FakeAccelerator())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, cell in CELLS.items():
        if names and not any(part in name for part in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = cell(Path(folder))
            except Exception:
                found[name] = {"error": traceback.format_exc()}
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
