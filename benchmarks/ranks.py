"""Several ranks: the cost of expert parallelism on a CPU, and a first test for users of several GPUs.

    python -m benchmarks.ranks                                two gloo ranks of this machine, one thread each; 1.5 minutes
    torchrun --nproc_per_node 8 -m benchmarks.ranks           on GPUs: exit code 1 if a number differs from one process's
    torchrun --nproc_per_node 2 -m benchmarks.ranks --tiny    the same, tiny, on two processes of a CPU

The first trains the quickstart's model in three layouts, in turn: `alone`, two independent processes, each with the whole model;
`degree 1`, where every rank has all experts and gradients are averaged; `degree 2`, where every rank has half of the experts and
tokens are exchanged by all-to-all. On GPUs: a layer over all ranks against the whole layer, the bandwidth of an all-to-all,
and tokens a second of 350M with 16 experts a rank under ZeRO 1. Rank 0 prints the results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed

from benchmarks.timing import ROOT, Benchmark, Part, Table
from nlgmoe import ExpertParallelStrategy
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.moe import MoELayer
from nlgmoe.module import MoEGPTModule
from nlgmoe.pyramid import ExpertPlacement
from nlgmoe.tools.planner.topology import read_settings
from tests.support.devices import draw, error, seconds, synchronize
from tests.support.spawn import spawn
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

LAYOUTS = {"alone": None, "degree 1": 1, "degree 2": 2}
WARM_UP, STEPS = 5, 20  # of a layout in a round
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


class Clock(Callback):
    """Records the time at which each step ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ended: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Read it."""
        synchronize(self.device)
        self.ended.append(time.perf_counter())


def train(config: GPTConfig, micro_batch: int, steps: int, device: torch.device, **options: Any) -> list[float]:
    """Train; returns the times at which steps ended. `options` are the trainer's."""
    clock = Clock(device)
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            max_steps=steps,
            gradient_clip_val=1.0,
            callbacks=[clock],
            default_root_dir=folder,
            limit_val_batches=0,
            **options | QUIET,
        )
        trainer.fit(MoEGPTModule(config), SyntheticData(config.vocab_size, config.seq_len, micro_batch))
    return clock.ended


def layouts(rounds: int) -> dict[str, float]:
    """Return the median seconds of a step by layout, of the slower rank."""
    medians: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(rounds):
        for layout in LAYOUTS:
            with TemporaryDirectory() as folder:
                ranks = spawn(2, in_layout, layout, folder=Path(folder))
            medians[layout].append(statistics.median(max(pair) for pair in zip(*ranks, strict=True)))
    return {layout: statistics.median(values) for layout, values in medians.items()}


def in_layout(layout: str) -> list[float]:
    """Return the seconds of the steps after the warm-up, in one of two processes."""
    degree = LAYOUTS[layout]
    options: dict[str, Any] = {"devices": 1}
    if degree is None:  # so that the trainer runs on one process
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]
    else:
        options = {"devices": 2, "strategy": ExpertParallelStrategy(stage=2, expert_parallel_size=degree)}
    config, _ = read_settings([str(ROOT / "configs/quickstart.yaml")])
    ended = train(config, 8, WARM_UP + STEPS, torch.device("cpu"), **options)[WARM_UP - 1 :]
    return [later - earlier for earlier, later in pairwise(ended)]


def layouts_table(measured: dict[str, float]) -> Table:
    rows = [[name, f"{1e3 * value:.0f}", f"{value / measured['alone']:.2f}"] for name, value in measured.items()]
    return ["layout", "ms a step", "of two processes alone"], rows


def parity(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """Return the largest relative error of a layer spread over all ranks: output, and the gradients of tokens and weights.

    The reference is the whole layer on each rank, whose gradients of the experts are summed over ranks.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    # The whole layer is on every rank, and grouped_mm takes fewer than 1,024 experts.
    count = 4 if tiny else max(1, min(16, 256 // ranks))
    width, tokens, first = (32, 48, rank * count) if tiny else (1024, 4096, rank * count)
    moe = MoEConfig(count * ranks, token_dropping=False, mlp_type="residual")
    config = GPTConfig(257, 64, 2, width, 4, moe=moe)
    whole = MoELayer(config, 1).to(device, dtype)
    draw(whole, std=0.1)
    for parameter in whole.parameters():
        distributed.broadcast(parameter.data, 0)
    spread = MoELayer(config, 1, ExpertPlacement(first, count, distributed.new_group(list(range(ranks)))))
    spread.to(device, dtype)

    def own(name: str, value: Tensor) -> Tensor:
        return value[first : first + count] if name.startswith("experts.") else value

    spread.load_state_dict({name: own(name, value) for name, value in whole.state_dict().items()})
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(rank)).to(device, dtype)
    found, expected = results(spread, x), results(whole, x)
    for name, value in expected.items():
        if name.startswith("experts."):
            distributed.all_reduce(value)
    return _worst(max(error(found[name], own(name, value)) for name, value in expected.items()), device)


def results(layer: MoELayer, x: Tensor) -> dict[str, Tensor]:
    """Return output and gradients by name."""
    x = x.clone().requires_grad_()
    y, _ = layer(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"output": y, "tokens": x.grad} | gradients


def bandwidth(device: torch.device, megabytes: float, rounds: int = 5) -> float:
    """Return the bytes a second that a rank sends to others in an even all-to-all; the slowest rank's."""
    ranks = distributed.get_world_size()
    sent = torch.zeros(ranks * int(megabytes * 1e6 / 2 / ranks), device=device, dtype=torch.bfloat16)
    received = torch.empty_like(sent)
    for _ in range(2):
        distributed.all_to_all_single(received, sent)
    distributed.barrier()
    taken = seconds(device, lambda: [distributed.all_to_all_single(received, sent) for _ in range(rounds)])
    return sent.nbytes * (ranks - 1) / ranks * rounds / _worst(taken, device)


def speed(device: torch.device, tiny: bool) -> float:
    """Return tokens a second of all ranks, training 350M with 16 experts a rank (tiny: almost nothing) under ZeRO 1."""
    ranks, warm_up, steps = distributed.get_world_size(), 1 if tiny else 4, 2 if tiny else 8
    moe = MoEConfig((2 if tiny else 16) * ranks)
    config = GPTConfig(257, 16, 2, 32, 2, moe=moe) if tiny else GPTConfig(50_257, 2048, 24, 1024, 16, moe=moe)
    options = {
        "devices": int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
        "num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "strategy": ExpertParallelStrategy(stage=1, expert_parallel_size=ranks),
        "precision": "bf16-mixed",
    }
    ended = train(config, 4, warm_up + steps, device, **options)
    return 4 * config.seq_len * steps * ranks / _worst(ended[-1] - ended[warm_up - 1], device)


def measure(device: torch.device, tiny: bool) -> dict[str, float]:
    """Return all figures, in an initialised process group."""
    found = {f"parity, {name}": parity(device, getattr(torch, name), tiny) for name in TOLERANCE}
    for megabytes in (0.01,) if tiny else (1, 16, 64, 256):
        found[f"all-to-all of {megabytes} MB, GB/s a rank"] = bandwidth(device, megabytes) / 1e9
    found["tokens/s"] = speed(device, tiny)
    return found


def wrong(found: dict[str, float]) -> list[str]:
    """Return the figures of parity that are not within their tolerance."""
    return [name for name, limit in TOLERANCE.items() if not found[f"parity, {name}"] <= limit]


def _worst(value: float, device: torch.device) -> float:
    """Return the maximum over ranks."""
    every = torch.tensor(value, device=device)
    distributed.all_reduce(every, distributed.ReduceOp.MAX)
    return float(every)


def under_torchrun() -> int:
    """Measure on the ranks of torchrun; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to test the script")
    tiny, on_gpu, local = parser.parse_args().tiny, torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    found = measure(device, tiny)
    if distributed.get_rank() == 0:
        print(json.dumps({"ranks": distributed.get_world_size(), **found}, indent=1))
    distributed.destroy_process_group()
    return int(bool(wrong(found)))


BENCHMARK = Benchmark("ranks", "scaling.md", {"layouts": Part(layouts, layouts_table, 2, threads=1)})

if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.exit(under_torchrun())
    BENCHMARK.run(__doc__)
