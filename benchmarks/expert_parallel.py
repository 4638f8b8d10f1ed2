"""What expert parallelism costs on two ranks: bytes on the wire, and the time of a step.

    python benchmarks/expert_parallel.py [--rounds 3] [--steps 30]

The quickstart's model on two gloo ranks of one machine, one thread each, in three layouts:

    alone      two processes that know nothing of each other, each with the whole model: the floor
    degree 1   data parallel: every rank has all experts, gradients are averaged
    degree 2   expert parallel: every rank has half of the experts, tokens travel

Rounds alternate between the layouts; a layout's time is the median over its rounds of a round's median step. Bytes are counted
where they leave a rank: rows of tokens against what has to travel (each row for an expert elsewhere, there and back, forward
and backward), and against the padded slots that a fixed-capacity exchange sends.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed, multiprocessing

from nlgmoe import ExpertParallelStrategy, load_config
from nlgmoe.layers.router import capacity
from nlgmoe.versions import versions

ROOT = Path(__file__).parents[1]
LAYOUTS = {"alone": None, "degree 1": 1, "degree 2": 2}


class Meter(Callback):
    """Times steps, and counts the bytes that `all_to_all_single` sends to other ranks."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.rows = self.counts = self.needed = self.padded = 0
        self._send = distributed.all_to_all_single

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from here on."""

        def counting(output: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
            splits = args[1] if len(args) > 1 else None
            rank, ranks = distributed.get_rank(kwargs["group"]), distributed.get_world_size(kwargs["group"])
            own = splits[rank] if splits is not None else len(sent) // ranks
            size = (len(sent) - own) * sent[0].numel() * sent.element_size() if len(sent) else 0
            if splits is None:
                self.counts += size
            else:
                self.rows += size
            return self._send(output, sent, *args, **kwargs)

        distributed.all_to_all_single = counting

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it, and count what has to travel."""
        self.seconds.append(time.perf_counter() - self._started)
        config = pl_module.config
        for layer, routing in zip(_moe_layers(pl_module), pl_module.routings, strict=True):
            if layer.placement.group is None:
                continue
            first, count = layer.placement.first, layer.placement.count
            elsewhere = routing.kept & ((routing.expert < first) | (routing.expert >= first + count))
            # There and back, forward and backward: a row crosses four times on the asking side and four on the serving
            # side; summed over ranks each crossing is counted once where it leaves.
            row = config.hidden_size * 4
            self.needed += 4 * int(elsewhere.sum()) * row
            experts, tokens = layer.router.num_experts, len(routing.expert)
            slots = capacity(tokens, experts, 1, config.moe.train_capacity_factor, config.moe.min_capacity)
            self.padded += 4 * (experts - count) * slots * row

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop counting."""
        distributed.all_to_all_single = self._send


def _moe_layers(module: Any) -> list[Any]:
    return [block.moe for block in module.gpt.blocks if block.moe is not None]


def _worker(rank: int, port: int, layout: str, steps: int, folder: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    degree = LAYOUTS[layout]
    if degree is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_RUN_ID"] = "benchmark"
    experiment = load_config(
        ROOT / "configs/quickstart.yaml",
        data__data_dir=str(ROOT / "data/pocket_pile"),
        data__micro_batch_size=8,
        trainer__max_steps=steps,
        trainer__limit_val_batches=0,
        trainer__enable_progress_bar=False,
        trainer__enable_checkpointing=False,
        trainer__callbacks="[]",
        trainer__logger="false",
        trainer__default_root_dir=f"{folder}/{layout}-{rank}",
        trainer__devices=1 if degree is None else 2,
        **({} if degree is None else {"trainer__strategy": _strategy(degree)}),
    )
    meter = Meter()
    experiment.trainer.callbacks.append(meter)
    experiment.trainer.fit(experiment.module, experiment.data)
    found = {name: getattr(meter, name) for name in ("seconds", "rows", "counts", "needed", "padded")}
    Path(folder, f"{layout}-{rank}.json").write_text(json.dumps(found))


def _strategy(degree: int) -> str:
    name = f"{ExpertParallelStrategy.__module__}.{ExpertParallelStrategy.__name__}"
    return json.dumps({"class_path": name, "init_args": {"stage": 2, "expert_parallel_size": degree}})


def run(layout: str, steps: int) -> list[dict[str, Any]]:
    """What two processes in a layout measured."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        multiprocessing.start_processes(_worker, (port, layout, steps, folder), nprocs=2, start_method="spawn")
        return [json.loads(Path(folder, f"{layout}-{rank}.json").read_text()) for rank in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times each layout is run")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps a run; the first 5 are not counted")
    parser.add_argument("--output", default=str(ROOT / "docs/results/expert_parallel.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.steps <= 5:
        parser.error(f"--steps {arguments.steps} leaves none to measure; give 6 or more")
    medians: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    traffic: dict[str, int] = {}
    for _ in range(arguments.rounds):
        for layout in LAYOUTS:
            ranks = run(layout, arguments.steps)
            medians[layout].append(
                statistics.median(max(pair) for pair in list(zip(*(r["seconds"] for r in ranks), strict=True))[5:])
            )
            if layout == "degree 2":
                traffic = {name: sum(rank[name] for rank in ranks) for name in ("rows", "counts", "needed", "padded")}
    step = {layout: statistics.median(values) for layout, values in medians.items()}
    per = arguments.steps * 2 * 8 * 128 * 3  # steps, ranks, sequences, positions, MoE layers
    results = {
        "seconds_per_step": medians,
        "ratio_to_alone": {layout: step[layout] / step["alone"] for layout in LAYOUTS},
        "bytes_per_token_and_layer": {name: value / per for name, value in traffic.items()},
        "rows_over_needed": traffic["rows"] / traffic["needed"],
        "rows_over_padded": traffic["rows"] / traffic["padded"],
        "settings": {"rounds": arguments.rounds, "steps": arguments.steps, "threads": 1, "hidden_size": 128},
        "versions": versions(),
    }
    Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")
    print(f"{'layout':<10} {'ms a step':>10} {'to alone':>9}")
    for layout, seconds in step.items():
        print(f"{layout:<10} {1000 * seconds:>10.1f} {results['ratio_to_alone'][layout]:>9.2f}")
    print("\nbytes that leave a rank, per token and MoE layer (degree 2):")
    for name, what in {
        "rows": "rows sent",
        "needed": "rows that have to travel",
        "counts": "sizes of the messages",
        "padded": "what padded slots would be",
    }.items():
        print(f"  {what:<28} {results['bytes_per_token_and_layer'][name]:>8.1f}")


if __name__ == "__main__":
    main()
