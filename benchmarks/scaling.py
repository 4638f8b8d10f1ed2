"""The paper's models on the paper's GPUs, predicted: no GPU is needed. 5 seconds.

    python -m benchmarks.scaling

Every model runs under ZeRO 1 with expert parallelism over all GPUs, and with fp16 and recomputed activations, as the paper's
scripts have it; the micro-batch is the file's, or the largest divisor of it that the global batch allows.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.timing import ROOT, Benchmark, Part, Table
from nlgmoe.hardware import HARDWARE
from nlgmoe.model.counting import count_parameters
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.inspect_config import layout, read_settings
from nlgmoe.tools.planner.topology import Topology

GPU, GPUS = HARDWARE["a100-40"], (64, 128)


def spread(settings: dict[str, Any], gpus: int) -> Topology:
    """Return the files' run on `gpus` ranks."""
    data = settings["data"]
    micro_batch = math.gcd(data["micro_batch_size"], data["global_batch_size"] // gpus)
    given = {"gpus": gpus, "expert_parallel_size": gpus, "zero_stage": 1, "micro_batch_size": micro_batch}
    trainer = settings["trainer"] | {"precision": "16-mixed"}
    return layout(settings | {"trainer": trainer}, given | {"activation_checkpointing": True})


def predict(_: int) -> list[dict[str, Any]]:
    """Return size, memory of a rank and speed of every model."""
    folders, rows = [ROOT / "configs" / family for family in ("dense", "moe", "pr_moe", "mos")], []
    files = [file for folder in folders for file in folder.glob("*.yaml") if file.stem != "laptop"]
    models = [(file.stem, *read_settings([str(file)])) for file in files]
    for name, config, settings in sorted(
        models, key=lambda model: (model[1].hidden_size, count_parameters(model[1]).total)
    ):
        for gpus in GPUS:
            topology, count = spread(settings, gpus), count_parameters(config)
            cost = estimate(config, topology, GPU)
            degrees = "/".join(str(degree) for degree in dict.fromkeys(topology.degrees(config)) if degree)
            row = {"model": name, "parameters": count.total, "active": count.active, "gpus": gpus, "degrees": degrees}
            row |= {"micro_batch_size": topology.micro_batch_size, "memory": cost.memory.total}
            row |= {"all_to_all": cost.communication.all_to_all, "tokens_per_second": cost.tokens_per_second}
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    cells: list[Any] = []
    for both in zip(*(rows[start :: len(GPUS)] for start in range(len(GPUS))), strict=True):
        sizes = [f"{both[0][key] / 1e9:.2f} B" for key in ("parameters", "active")]
        memory, sent = (
            "; ".join(f"{row[key] / 2**30:.{digits}f}" for row in both)
            for key, digits in (("memory", 1), ("all_to_all", 2))
        )
        speed = "; ".join(f"{row['tokens_per_second'] / 1e6:.2f} M" for row in both)
        cells.append([both[0]["model"], *sizes, memory, sent, speed])
    return ["64; 128 GPUs", "parameters", "active", "memory of a rank, GiB", "all-to-all, GiB/step", "tokens/s"], cells


BENCHMARK = Benchmark("scaling", "scaling.md", {"models": Part(predict, table)})

if __name__ == "__main__":
    BENCHMARK.run(__doc__)
