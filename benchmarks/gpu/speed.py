"""Steps of `make gpu` that measure: where the host waits for the GPU; tokens a second, MFU, memory and kernels of 350M models."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.run import Run, sync_debug, waits
from benchmarks.runs import ROOT
from nlgmoe.callbacks import ExpertLoad, StopOnSignal, Throughput
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.hardware import peak_of
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.grouped_gemm import choose_grouped_gemm, compute_capability
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.counting import flops_per_token
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule, compile_dense_parts
from nlgmoe.parallel.strategy import ExpertParallelStrategy
from nlgmoe.parallel.triton_grouped_gemm import set_triton_grouped_gemm, triton_grouped_gemm
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.topology import Topology, named_machine
from tests.support.devices import synchronize
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

VARIANTS: dict[str, dict[str, Any]] = {
    "capacity": {},
    "dropless, residual": {"token_dropping": False, "mlp_type": "residual"},
    "top-2, sampled": {"top_k": 2},
    "top-4": {"top_k": 4},
    "jitter": {"noise": "jitter"},
}
WARM_UP, STEPS, LOGGED = 5, 20, 10
MODES = ("eager", "recomputed", "compiled")
SEQUENCES, ACCUMULATED, EXPERTS, SHOWN = 4, 8, 16, 15


def waiting(run: Run, folder: Path) -> None:
    """Count waits for the GPU: none in model, loss and backward; at most two a step in the trainer."""
    has_triton = triton_grouped_gemm(run.device) is not None
    dropless = choose_grouped_gemm(torch.bfloat16, (512, 2048), compute_capability(run.device), False, has_triton)
    run.note("product of dropless experts", dropless)
    for name, variant in VARIANTS.items():
        if dropless == "loop" and not variant.get("token_dropping", True):
            continue  # each MoE layer waits once
        run.correct(f"waits in model, loss and backward, {name}", waits(run.device, model_step(run, variant)))
    width, length = (32, 16) if run.dry else (512, 512)
    module = MoEGPTModule(GPTConfig(4096, length, 4, width, 4, moe=MoEConfig(8, mlp_type="residual")))
    with warnings.catch_warnings(record=True) as caught, sync_debug(run.device, "warn"):
        warnings.simplefilter("always")
        count = CountWaits(caught)
        callbacks = [Throughput(), ExpertLoad(), StopOnSignal(), count]
        options = {"log_every_n_steps": LOGGED, "default_root_dir": folder, "gradient_clip_val": 1.0} | QUIET
        trainer = Trainer(accelerator=run.accelerator, devices=1, precision="bf16-mixed", callbacks=callbacks,
                          max_steps=WARM_UP + STEPS + 1, **options)  # fmt: skip
        trainer.fit(module, SyntheticData(4096, length))
    run.correct("waits a trainer's step", None if run.dry else statistics.mean(count.counts), at_most=2)
    run.note("waits by place", dict(count.places.most_common(8)))


def model_step(run: Run, variant: dict[str, Any]) -> Callable[[], None]:
    """Return forward, loss and backward of a small model in bf16, with documents."""
    vocabulary, length, width = (257, 16, 32) if run.dry else (50_257, 512, 512)
    model = GPT(GPTConfig(vocabulary, length, 4, width, 4, hidden_dropout=0.1, moe=MoEConfig(8, **variant))).to(
        run.device
    )
    set_triton_grouped_gemm(model, run.device)
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


class Modes(Callback):
    """Switches a model through the modes, and measures the second step of each: figures are those of a micro-batch."""

    def __init__(self, run: Run, config: GPTConfig, modes: Sequence[str], accumulated: int) -> None:
        self.run, self.config, self.modes, self.accumulated = run, config, modes, accumulated
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Switch, or start measuring."""
        mode, position = divmod(batch_idx, 2 * self.accumulated)
        if position == 0:
            pl_module.gpt.activation_checkpointing = self.modes[mode] == "recomputed"
            if self.modes[mode] == "compiled":
                compile_dense_parts(pl_module.gpt)
        if batch_idx == self.accumulated - 1:
            self._profile.start()
        if position == self.accumulated:
            synchronize(self.run.device)
            if not self.run.dry:
                torch.cuda.reset_peak_memory_stats()
            self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop measuring, and add the figures."""
        mode, position = divmod(batch_idx, 2 * self.accumulated)
        if batch_idx == self.accumulated - 1:
            self._profile.stop()
            # Not operators of the host: their time is that of their kernels.
            events = [event for event in self._profile.key_averages() if event.device_type != DeviceType.CPU]
            events.sort(key=lambda event: -event.self_device_time_total)
            kernels = {event.key: event.self_device_time_total / 1e3 for event in events[:SHOWN]}
            self.run.note("ms by kernel of an eager micro-batch and the optimizer's step", kernels)
        if position == 2 * self.accumulated - 1:
            synchronize(self.run.device)
            self.report(self.modes[mode], (time.perf_counter() - self._started) / self.accumulated)

    def report(self, mode: str, seconds: float) -> None:
        """Add the figures of a mode."""
        tokens, peak = SEQUENCES * self.config.seq_len, peak_of(self.run.card, "bf16-mixed", tf32=False)
        self.run.note(f"tokens/s, {mode}", tokens / seconds)
        if peak is not None:
            mfu = tokens * flops_per_token(self.config) / seconds / peak
            self.run.goal(f"MFU, {mode}; later 0.33", mfu, at_least=0.20)
        if not self.run.dry:
            recomputed = mode == "recomputed"
            topology = Topology(1, 1, 1, SEQUENCES, SEQUENCES * self.accumulated, activation_checkpointing=recomputed)
            share = (
                torch.cuda.max_memory_allocated() / estimate(self.config, topology, named_machine("h100")).memory.total
            )
            self.run.goal(f"peak memory over nlgmoe inspect, {mode}", share, at_least=0.8, at_most=1.0)


def train(run: Run, folder: Path, file: str) -> None:
    """Train a model of the paper under ZeRO 1 through the modes; a tiny one in a dry run.

    Steps have 8 micro-batches, which is what 8 GPUs have, and 16 experts a layer are what a GPU holds where 8 share 128.
    """
    values = yaml.safe_load((ROOT / "configs" / f"{file}.yaml").read_text())["model"]["config"]
    if values.get("moe"):
        values["moe"]["num_experts"] = EXPERTS
    tiny = {"vocab_size": 257, "seq_len": 32, "num_layers": 2, "hidden_size": 32, "num_heads": 2} if run.dry else {}
    config = GPTConfig.from_dict(values | tiny)
    modes, accumulated = (MODES[:2], 2) if run.dry else (MODES, ACCUMULATED)  # to compile takes longer than a dry run
    trainer = Trainer(
        accelerator=run.accelerator,
        devices=1,
        strategy=ExpertParallelStrategy(stage=1),
        precision="bf16-mixed",
        max_steps=2 * len(modes),
        accumulate_grad_batches=accumulated,
        gradient_clip_val=1.0,
        log_every_n_steps=1000,
        limit_val_batches=0,  # a validation at the end would be compiled
        callbacks=[Modes(run, config, modes, accumulated)],
        default_root_dir=folder,
        **QUIET,
    )
    trainer.fit(MoEGPTModule(config), SyntheticData(config.vocab_size, config.seq_len, SEQUENCES))


def dense(run: Run, folder: Path) -> None:
    """Train 350M dense."""
    train(run, folder, "dense/350m_dense")


def experts(run: Run, folder: Path) -> None:
    """Train 350M with 16 experts; beside dense, where that was measured."""
    train(run, folder, "moe/350m_moe_128")
    speed = {
        step: {figure["name"]: figure["value"] for figure in run.results.step(step)["figures"]}
        for step in ("dense", "experts")
        if step in run.results.run["steps"]
    }
    for mode in MODES:
        dense, moe = (speed.get(step, {}).get(f"tokens/s, {mode}") for step in ("dense", "experts"))
        if dense and moe:
            run.goal(f"time of MoE over dense, {mode}", dense / moe, at_most=1.3)
