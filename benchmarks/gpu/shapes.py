"""Step `shapes`: training steps of the 350M models, dense and with 16 experts: speed, memory and what takes the time.

Each is built once and trained through the strategy: eager, recomputed, compiled, each a step of warm-up and a measured one of 8
micro-batches, which is what 8 GPUs have. 16 experts a layer are what a GPU holds where 8 share 128. ZeRO 1; the one with experts
also under ZeRO 2, which `configs/hardware/gpu.yaml` sets, eager.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.run import ROOT, Run, quiet_trainer, synchronize
from nlgmoe.config import GPTConfig
from nlgmoe.model.compiling import compile_dense_parts
from nlgmoe.model.counting import flops_per_token
from nlgmoe.module import MoEGPTModule
from nlgmoe.monitoring.hardware import hardware, peak_of
from nlgmoe.parallel.strategy import ExpertParallelStrategy
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.topology import Topology
from tests.synthetic import SyntheticData

MODES = ("eager", "recomputed", "compiled")
SEQUENCES, ACCUMULATED, EXPERTS, SHOWN = 4, 8, 16, 15


class Modes(Callback):
    """Switches the model through the modes, and measures the second step of each.

    Attributes:
        seconds: of a micro-batch, a share of the optimizer's step included, by mode.
        peak: bytes of tensors at most in those steps, by mode; none on a CPU.
        kernels: milliseconds by kernel, of the last micro-batch of the first step and the optimizer's step after it.
    """

    def __init__(self, modes: tuple[str, ...], accumulated: int) -> None:
        self.modes, self.accumulated = modes, accumulated
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.kernels: dict[str, float] = {}
        self.error: Exception | None = None  # that ended the run early
        self._started = 0.0
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
            synchronize(pl_module.device)
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write down."""
        mode, position = divmod(batch_idx, 2 * self.accumulated)
        if batch_idx == self.accumulated - 1:
            self._profile.stop()
            # Not operators of the host: their time is that of their kernels.
            events = [one for one in self._profile.key_averages() if one.device_type != DeviceType.CPU]
            taken = {event.key: event.self_device_time_total / 1e3 for event in events}
            taken = {name: value for name, value in taken.items() if value > 0}
            self.kernels = dict(sorted(taken.items(), key=lambda item: -item[1])[:SHOWN])
        if position == 2 * self.accumulated - 1:
            synchronize(pl_module.device)
            self.seconds[self.modes[mode]] = (time.perf_counter() - self._started) / self.accumulated
            if pl_module.device.type == "cuda":
                self.peak[self.modes[mode]] = torch.cuda.max_memory_allocated()


def shapes(run: Run, folder: Path) -> None:
    """Measure the dense model, then the one with experts."""
    with_experts, name = config_of("moe/350m_moe_128", run.dry), f"MoE-{EXPERTS}"
    dense = measure(run, folder, "dense", config_of("dense/350m_dense", run.dry))
    experts = measure(run, folder, name, with_experts)
    sharded = measure(run, folder, f"{name} under ZeRO 2", with_experts, stage=2, modes=MODES[:1])
    if "eager" in experts.seconds and "eager" in sharded.seconds:
        run.note("ZeRO 2 over ZeRO 1, a micro-batch, eager", sharded.seconds["eager"] / experts.seconds["eager"])
    for mode in [mode for mode in MODES if mode in dense.seconds and mode in experts.seconds]:
        run.aim(f"MoE over dense, {mode}", experts.seconds[mode] / dense.seconds[mode], at_most=1.3)
    for modes in (dense, experts, sharded):
        if modes.error is not None:
            raise modes.error


def config_of(name: str, dry: bool) -> GPTConfig:
    """The model of a configuration of the paper, with `EXPERTS` experts where it has any; tiny in a dry run."""
    values = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"]["config"]
    if values.get("moe"):
        values["moe"]["num_experts"] = EXPERTS
    tiny = {"vocab_size": 257, "seq_len": 32, "num_layers": 2, "hidden_size": 32, "num_heads": 2} if dry else {}
    return GPTConfig.from_dict(values | tiny)


def measure(
    run: Run, folder: Path, name: str, config: GPTConfig, stage: Literal[1, 2] = 1, modes: tuple[str, ...] = MODES
) -> Modes:
    """Train a model through the modes."""
    # Compiling takes longer than the rest of a dry run.
    measured = Modes(modes[:2], 2) if run.dry else Modes(modes, ACCUMULATED)
    trainer = quiet_trainer(
        run,
        folder,
        strategy=ExpertParallelStrategy(stage=stage),
        precision="bf16-mixed",
        max_steps=2 * len(measured.modes),
        accumulate_grad_batches=measured.accumulated,
        log_every_n_steps=1000,
        limit_val_batches=0,  # the end would be validated, and compiled for it
        callbacks=[measured],
    )
    try:
        trainer.fit(MoEGPTModule(config), SyntheticData(config.vocab_size, config.seq_len, SEQUENCES))
    except Exception as error:  # what was measured before it counts, and so does the other model
        measured.error = error
    if trainer.strategy._engine is not None:
        trainer.strategy._engine.destroy()  # its buffers would outlive the trainer, and count in the next model's peak
    del trainer
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    report(run, name, config, stage, measured)
    return measured


def report(run: Run, name: str, config: GPTConfig, stage: int, modes: Modes) -> None:
    """Figures of a model."""
    tokens, peak = SEQUENCES * config.seq_len, peak_of(run.card, "bf16-mixed", tf32=False)
    topology = Topology(1, 1, stage, SEQUENCES, SEQUENCES * modes.accumulated)
    for mode, seconds in modes.seconds.items():
        run.note(f"ms a micro-batch, {name}, {mode}", 1e3 * seconds)
        if peak is not None:
            mfu = tokens * flops_per_token(config) / seconds / peak
            for goal in (0.20, 0.33):
                run.aim(f"MFU, {name}, {mode}, goal {goal:.2f}", mfu, at_least=goal)
        again = replace(topology, activation_checkpointing=mode == "recomputed")
        if mode in modes.peak:
            expected = estimate(config, again, hardware("h100")).memory.total
            run.aim(f"peak memory over nlgmoe inspect, {name}, {mode}", modes.peak[mode] / expected, 0.8, 1.0)
    run.note(f"ms by kernel of an eager micro-batch and the optimizer, {name}", modes.kernels)
