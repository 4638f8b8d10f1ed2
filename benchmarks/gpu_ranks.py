"""Several GPUs: the same numbers as one process, the all-to-all's bandwidth, tokens a second. For users to run first.

    torchrun --nproc_per_node 8 benchmarks/gpu_ranks.py
    torchrun --nproc_per_node 2 benchmarks/gpu_ranks.py --tiny     two gloo processes on the CPU, if there is no GPU

Exit code 1 if a number differs. Every rank computes, the first one prints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.run import draw, error, seconds, synchronize  # noqa: E402
from benchmarks.runs import QUIET  # noqa: E402
from nlgmoe.config import GPTConfig, MoEConfig  # noqa: E402
from nlgmoe.layers.moe import MoELayer  # noqa: E402
from nlgmoe.layers.placement import ExpertPlacement  # noqa: E402

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def parity(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """Largest relative error of a layer spread over all ranks: output, and the gradients of tokens and weights.

    It is held against the whole layer on each rank, whose gradients of the experts are summed over ranks.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    # The whole layer is on every rank, and grouped_mm takes fewer than 1,024 experts.
    each = max(1, min(16, 256 // ranks))
    width, tokens, experts = (32, 48, 4 * ranks) if tiny else (1024, 4096, each * ranks)
    config = GPTConfig(257, 64, 2, width, 4, moe=MoEConfig(experts, token_dropping=False, mlp_type="residual"))
    whole = MoELayer(config, 1).to(device, dtype)
    draw(whole, std=0.1)
    for parameter in whole.parameters():
        distributed.broadcast(parameter.data, 0)
    first, count = rank * experts // ranks, experts // ranks
    spread = MoELayer(config, 1, ExpertPlacement(first, count, distributed.new_group(list(range(ranks)))))
    spread.to(device, dtype)
    mine = {
        name: value[first : first + count] if name.startswith("experts.") else value
        for name, value in whole.state_dict().items()
    }
    spread.load_state_dict(mine)
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(rank)).to(device, dtype)
    found, expected = results(spread, x), results(whole, x)
    for name, value in expected.items():
        if name.startswith("experts."):
            distributed.all_reduce(value)
            expected[name] = value[first : first + count]
    return _worst(max(error(found[name], value) for name, value in expected.items()), device)


def results(layer: MoELayer, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    x = x.clone().requires_grad_()
    y, _ = layer(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"output": y, "tokens": x.grad} | gradients


def bandwidth(device: torch.device, megabytes: float, rounds: int = 5) -> float:
    """Bytes a second that a rank sends to others in an even all-to-all of so many megabytes; the slowest rank's."""
    ranks = distributed.get_world_size()
    sent = torch.zeros(ranks * int(megabytes * 1e6 / 2 / ranks), device=device, dtype=torch.bfloat16)
    received = torch.empty_like(sent)
    for _ in range(2):
        distributed.all_to_all_single(received, sent)
    distributed.barrier()
    taken = seconds(device, lambda: [distributed.all_to_all_single(received, sent) for _ in range(rounds)])
    return sent.nbytes * (ranks - 1) / ranks * rounds / _worst(taken, device)


def speed(device: torch.device, tiny: bool) -> float:
    """Tokens a second of all ranks, training 350M with 16 experts a rank (tiny: almost nothing) under ZeRO 1."""
    from lightning import Trainer
    from lightning.pytorch.callbacks import Callback

    from nlgmoe.module import MoEGPTModule
    from nlgmoe.parallel.strategy import ExpertParallelStrategy
    from tests.synthetic import SyntheticData

    ranks, warm_up, steps = distributed.get_world_size(), 1 if tiny else 4, 2 if tiny else 8
    moe = MoEConfig((2 if tiny else 16) * ranks)
    config = GPTConfig(257, 16, 2, 32, 2, moe=moe) if tiny else GPTConfig(50_257, 2048, 24, 1024, 16, moe=moe)

    class Clock(Callback):
        """From the end of the warm-up to the end of the last step."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx + 1 in (warm_up, warm_up + steps):
                synchronize(device)
                self.started, self.ended = getattr(self, "ended", 0.0), time.perf_counter()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
            strategy=ExpertParallelStrategy(stage=1, expert_parallel_size=ranks),
            precision="bf16-mixed",
            max_steps=warm_up + steps,
            gradient_clip_val=1.0,
            callbacks=[clock],
            default_root_dir=folder,
            **QUIET,
        )
        trainer.fit(MoEGPTModule(config), SyntheticData(config.vocab_size, config.seq_len, 4))
    return 4 * config.seq_len * steps * ranks / _worst(clock.ended - clock.started, device)


def measure(device: torch.device, tiny: bool) -> dict[str, float]:
    """All of it, in an initialised process group."""
    found = {f"parity, {name}": parity(device, getattr(torch, name), tiny) for name in TOLERANCE}
    for megabytes in (0.01,) if tiny else (1, 16, 64, 256):
        found[f"all-to-all of {megabytes} MB, GB/s a rank"] = bandwidth(device, megabytes) / 1e9
    found["tokens/s"] = speed(device, tiny)
    return found


def wrong(found: dict[str, float]) -> list[str]:
    """The figures of parity that are not within their tolerance."""
    return [name for name, limit in TOLERANCE.items() if not found[f"parity, {name}"] <= limit]


def _worst(value: float, device: torch.device) -> float:
    """The largest of all ranks'."""
    every = torch.tensor(value, device=device)
    distributed.all_reduce(every, distributed.ReduceOp.MAX)
    return float(every)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="almost nothing, to see whether it runs")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    distributed.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    found = measure(device, arguments.tiny)
    if distributed.get_rank() == 0:
        print(json.dumps({"ranks": distributed.get_world_size(), **found}, indent=1))
    distributed.destroy_process_group()
    return int(bool(wrong(found)))


if __name__ == "__main__":
    sys.exit(main())
