"""Where the host waits for the GPU: not in model, loss and backward pass, and at most twice in a trainer's step."""

import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from nlgmoe.callbacks import ExpertLoad, StopOnSignal, Throughput
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.grouped_gemm import choose_grouped_gemm, compute_capability
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from nlgmoe.parallel.triton_grouped_gemm import set_triton_grouped_gemm, triton_grouped_gemm
from tests.gpu.conftest import DRY
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

VARIANTS: dict[str, dict[str, Any]] = {
    "capacity": {},
    "dropless, residual": {"token_dropping": False, "mlp_type": "residual"},
    "top-2, sampled": {"top_k": 2},
    "top-4": {"top_k": 4},
    "jitter": {"noise": "jitter"},
}
WARM_UP, STEPS = 5, 20


@contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """Let operations that wait for the GPU fail (`error`) or warn (`warn`); on a CPU nothing waits."""
    if DRY:
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_loss_and_backward_do_not_wait(variant: str, device: torch.device) -> None:
    has_triton = triton_grouped_gemm(device) is not None
    product = choose_grouped_gemm(torch.bfloat16, (512, 2048), compute_capability(device), False, has_triton)
    if product == "loop" and "dropless" in variant:
        pytest.skip("the card has no grouped GEMM: each dropless layer waits once")
    vocabulary, length, width = (257, 16, 32) if DRY else (50_257, 512, 512)
    moe = MoEConfig(8, **VARIANTS[variant])
    model = GPT(GPTConfig(vocabulary, length, 4, width, 4, hidden_dropout=0.1, moe=moe)).to(device)
    set_triton_grouped_gemm(model, device)
    batch = torch.randint(vocabulary, (4, length + 1)).to(device)
    documents = (torch.arange(length, device=device) // 7).expand(4, length)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            output = model(batch[:, :-1], noise_key=(0, 0, 0), documents=documents)
            hidden, targets = output.hidden.flatten(0, 1), batch[:, 1:].flatten()
            loss = cross_entropy(hidden, model.unembedding, vocabulary, targets, None, 1024)
        (loss + 0.01 * router_losses(output.routings)[0]).backward()

    step()  # libraries initialise at first use
    with sync_debug("error"):
        step()


class CountWaits(Callback):
    """Counts the waits of each training step after a warm-up, logging included, by line of code."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self.caught = caught
        self.counts: list[int] = []
        self.places: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the waits since the last call: a step is logged after its end."""
        messages = [message for message in self.caught if "synchronizing" in str(message.message)]
        self.caught.clear()
        if batch_idx > WARM_UP:
            self.counts.append(len(messages))
            self.places.update(f"{Path(message.filename).name}:{message.lineno}" for message in messages)


def test_a_trainers_step_waits_at_most_twice(device: torch.device, tmp_path: Path) -> None:
    width, length = (32, 16) if DRY else (512, 512)
    module = MoEGPTModule(GPTConfig(4096, length, 4, width, 4, moe=MoEConfig(8, mlp_type="residual")))
    with warnings.catch_warnings(record=True) as caught, sync_debug("warn"):
        warnings.simplefilter("always")
        count = CountWaits(caught)
        options: dict[str, Any] = {"log_every_n_steps": 10, "default_root_dir": tmp_path, "gradient_clip_val": 1.0}
        callbacks = [Throughput(), ExpertLoad(), StopOnSignal(), count]
        trainer = Trainer(accelerator="cpu" if DRY else "gpu", devices=1, precision="bf16-mixed", callbacks=callbacks,
                          max_steps=WARM_UP + STEPS + 1, **options | QUIET)  # fmt: skip
        trainer.fit(module, SyntheticData(4096, length))
    assert len(count.counts) == STEPS and statistics.mean(count.counts) <= 2, count.places.most_common(8)
