"""What runs on the fake accelerator, beside the same on the CPU; `python -m tests.accelerator.cells FILE` writes what happened.

Each cell is a function of `CELLS`; its result is JSON: what it returns, or the traceback that it ended with.
"""

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from nlgmoe import MoEGPTModule, generate
from nlgmoe.callbacks import StagedDistillation
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.model.gpt import GPT
from nlgmoe.non_finite import NonFinite, NonFiniteError
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.surgery.warm_start import WarmStart
from tests.accelerator import fake
from tests.accelerator.training import CPU, FAKE, VARIANT_CELLS, Steps, config, make_trainer, on_both, train
from tests.support.synthetic import NumberedData


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


def generation(root: Path) -> dict[str, Any]:
    """The most likely tokens, and drawn ones; prompts of several lengths."""
    prompts, texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], {}
    for device in (CPU, FAKE):
        model = GPT(config({"top_k": 2, "mlp_type": "residual"}), seed=3).to(device).eval()
        greedy = generate(model, prompts, 8, temperature=0.0)
        texts[device] = [*greedy, *generate(model, prompts, 8, temperature=1.5, top_k=20, top_p=0.9, stop_ids=[7])]
    return {"tokens": texts[FAKE], "expected": {"tokens": texts[CPU]}}


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


CELLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **VARIANT_CELLS,
    "dropout": dropout,
    "online teacher in bf16 of a student in fp32": online_teacher,
    "generation": generation,
    "checkpoints": checkpoints,
    "steps that are not finite": non_finite,
}


def main(file: str) -> None:
    fake.install()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, cell in CELLS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = cell(Path(folder))
            except Exception:
                found[name] = {"error": traceback.format_exc()}
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
