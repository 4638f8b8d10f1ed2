"""Step `waiting`: where the host waits for the GPU. Nowhere in model, loss and backward; at most twice a step in the trainer."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.gpu.run import Run, quiet_trainer, sync_debug, waits
from nlgmoe.callbacks import ExpertLoad, StopOnSignal, Throughput
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.experts import select_backend
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from tests.synthetic import SyntheticData

VARIANTS: dict[str, dict[str, Any]] = {
    "capacity": {},
    "dropless, residual": {"token_dropping": False, "mlp_type": "residual"},
    "top-2, sampled": {"top_k": 2},
    "top-4": {"top_k": 4},
    "jitter": {"noise": "jitter"},
}
WARM_UP, STEPS, LOGGED = 5, 20, 10


def waiting(run: Run, folder: Path) -> None:
    """Count."""
    capability = None if run.dry else torch.cuda.get_device_capability(run.device)
    if select_backend(run.device.type, torch.bfloat16, (512, 2048), capability) == "loop":
        run.note("not counted", "on this card experts are computed one by one, and each MoE layer waits once")
        return
    for name, variant in VARIANTS.items():
        step = model_step(run, variant)
        step()  # the first time, libraries set themselves up
        run.correct(f"waits in model, loss and backward, {name}", waits(run.device, step))
    in_trainer(run, folder)


def model_step(run: Run, variant: dict[str, Any]) -> Callable[[], None]:
    """Forward, loss and backward of a small model in bf16, with documents."""
    vocabulary, length, width = (257, 16, 32) if run.dry else (50_257, 512, 512)
    config = GPTConfig(vocabulary, length, 4, width, 4, hidden_dropout=0.1, moe=MoEConfig(8, **variant))
    model = GPT(config).to(run.device)
    batch = torch.randint(vocabulary, (4, length + 1)).to(run.device)
    documents = (torch.arange(length, device=run.device) // 7).expand(4, length)

    def step() -> None:
        with torch.autocast(run.device.type, torch.bfloat16):
            output = model(batch[:, :-1], noise_key=(0, 0, 0), documents=documents)
            hidden, targets = output.hidden.flatten(0, 1), batch[:, 1:].flatten()
            loss = cross_entropy(hidden, model.unembedding, vocabulary, targets, None, 1024)
        (loss + 0.01 * router_losses(output.routings)[0]).backward()

    return step


class CountWaits(Callback):
    """Counts the waits of each training step after some of warm-up, logging included, and where they come from."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self.caught = caught
        self.counts: list[int] = []
        self.places: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """What a step logs comes after its end: it lasts to the next one's beginning."""
        found = [one for one in self.caught if "synchronizing" in str(one.message)]
        self.caught.clear()
        if batch_idx > WARM_UP:
            self.counts.append(len(found))
            self.places.update(f"{Path(one.filename).name}:{one.lineno}" for one in found)


def in_trainer(run: Run, folder: Path) -> None:
    """Count the waits of `Trainer.fit` with the callbacks of `train.py` that look at steps."""
    width, length = (32, 16) if run.dry else (512, 512)
    module = MoEGPTModule(GPTConfig(4096, length, 4, width, 4, moe=MoEConfig(8, mlp_type="residual")))
    with warnings.catch_warnings(record=True) as caught, sync_debug(run.device, "warn"):
        warnings.simplefilter("always")
        count = CountWaits(caught)
        trainer = quiet_trainer(
            run,
            folder,
            precision="bf16-mixed",
            max_steps=WARM_UP + STEPS + 1,
            log_every_n_steps=LOGGED,
            callbacks=[Throughput(), ExpertLoad(), StopOnSignal(), count],
        )
        trainer.fit(module, SyntheticData(4096, length))
    measured = None if run.dry else statistics.mean(count.counts)
    run.correct("waits a trainer's step", measured, at_most=2)
    run.note("waits by place", dict(count.places.most_common(8)))
