"""Tokens a second, MFU and memory of 350M models on one GPU, without and with 16 experts; a part of `make gpu`. 6 minutes.

    python -m benchmarks.gpu
    NLGMOE_GPU_DRY_RUN=1 python -m benchmarks.gpu      tiny, on the CPU; prints the table, and writes nothing

Both train under ZeRO 1 in bf16: a step of 8 micro-batches of 4 sequences, which is what 8 GPUs have, and 16 experts a layer,
which is what a GPU holds if 8 share 128. The kernels of an eager step are in the JSON file.
"""

from __future__ import annotations

import time
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.documents import markdown_table
from benchmarks.timing import ROOT, Benchmark, Part, Table
from nlgmoe.config import GPTConfig
from nlgmoe.hardware import peak_of
from nlgmoe.model.counting import flops_per_token
from nlgmoe.module import MoEGPTModule, compile_dense_parts
from nlgmoe.parallel.strategy import ExpertParallelStrategy
from nlgmoe.tools.planner.memory import memory_of
from nlgmoe.tools.planner.topology import Topology
from tests.gpu.conftest import DRY
from tests.support.devices import synchronize
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

MODELS = {"350M dense": "dense/350m_dense", "350M, 16 experts": "moe/350m_moe_128"}
MODES = ("eager", "recomputed") if DRY else ("eager", "recomputed", "compiled")  # to compile takes long
SEQUENCES, ACCUMULATED, EXPERTS, KERNELS = 4, 2 if DRY else 8, 16, 15
DEVICE = torch.device("cpu" if DRY else "cuda")


class Modes(Callback):
    """Trains two steps in each mode, and measures the second: figures are those of a micro-batch."""

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        self.measured: dict[str, dict[str, Any]] = {}
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Switch the mode, or start measuring."""
        mode, position = divmod(batch_idx, 2 * ACCUMULATED)
        if position == 0:
            pl_module.gpt.activation_checkpointing = MODES[mode] == "recomputed"
            if MODES[mode] == "compiled":
                compile_dense_parts(pl_module.gpt)
        if batch_idx == ACCUMULATED - 1:
            self._profile.start()
        if position == ACCUMULATED:
            synchronize(DEVICE)
            if not DRY:
                torch.cuda.reset_peak_memory_stats()
            self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop measuring."""
        mode, position = divmod(batch_idx, 2 * ACCUMULATED)
        if batch_idx == ACCUMULATED - 1:
            self._profile.stop()
        if position == 2 * ACCUMULATED - 1:
            synchronize(DEVICE)
            seconds = (time.perf_counter() - self._started) / ACCUMULATED
            self.measured[MODES[mode]] = self.figures(MODES[mode], seconds)

    def figures(self, mode: str, seconds: float) -> dict[str, Any]:
        """Return tokens a second, MFU, and the peak of memory over that which `nlgmoe inspect` predicts."""
        tokens = SEQUENCES * self.config.seq_len
        found: dict[str, Any] = {"tokens_per_second": tokens / seconds}
        if DRY:
            return found
        card = torch.cuda.get_device_name()
        peak = peak_of(card, "bf16-mixed", tf32=False)
        recomputed = mode == "recomputed"
        topology = Topology(1, 1, 1, SEQUENCES, SEQUENCES * ACCUMULATED, activation_checkpointing=recomputed)
        predicted = memory_of(self.config, topology).total
        found |= {"card": card, "mfu": peak and tokens * flops_per_token(self.config) / seconds / peak}
        return found | {"memory_over_predicted": torch.cuda.max_memory_allocated() / predicted}

    def kernels(self) -> dict[str, float]:
        """Return the milliseconds of the longest kernels of an eager micro-batch and the optimizer's step."""
        # Not operators of the host: their time is that of their kernels.
        events = [event for event in self._profile.key_averages() if event.device_type != DeviceType.CPU]
        events.sort(key=lambda event: -event.self_device_time_total)
        return {event.key: event.self_device_time_total / 1e3 for event in events[:KERNELS]}


def speed(_: int) -> dict[str, Any]:
    """Return the figures of both models by mode, and their kernels."""
    measured: dict[str, Any] = {}
    for name, file in MODELS.items():
        values = yaml.safe_load((ROOT / "configs" / f"{file}.yaml").read_text())["model"]["config"]
        if values.get("moe"):
            values["moe"]["num_experts"] = EXPERTS
        tiny = {"vocab_size": 257, "seq_len": 32, "num_layers": 2, "hidden_size": 32, "num_heads": 2} if DRY else {}
        config = GPTConfig.from_dict(values | tiny)
        modes = Modes(config)
        with TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator="cpu" if DRY else "gpu",
                devices=1,
                strategy=ExpertParallelStrategy(stage=1),
                precision="bf16-mixed",
                max_steps=2 * len(MODES),
                accumulate_grad_batches=ACCUMULATED,
                gradient_clip_val=1.0,
                log_every_n_steps=1000,
                limit_val_batches=0,  # a validation at the end would be compiled
                callbacks=[modes],
                default_root_dir=folder,
                **QUIET,
            )
            trainer.fit(MoEGPTModule(config), SyntheticData(config.vocab_size, config.seq_len, SEQUENCES))
        measured[name] = {"modes": modes.measured, "kernels_ms": modes.kernels()}
    return measured


def table(measured: dict[str, Any]) -> Table:
    rows: list[Any] = []
    for name, model in measured.items():
        for mode, found in model["modes"].items():
            shares = (found.get(key) for key in ("mfu", "memory_over_predicted"))
            cells = [None if share is None else f"{share:.2f}" for share in shares]
            rows.append([found.get("card"), name, mode, f"{found['tokens_per_second']:,.0f}", *cells])
    return ["card", "model", "mode", "tokens/s", "MFU", "peak memory over `nlgmoe inspect`"], rows


BENCHMARK = Benchmark("gpu", "scaling.md", {"speed": Part(speed, table)})

if __name__ == "__main__":
    if DRY:
        print(markdown_table(*table(speed(1))))
    else:
        BENCHMARK.run(__doc__)
