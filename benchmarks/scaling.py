"""The paper's models on the paper's GPUs, predicted and simulated: no GPU is needed. 5 seconds, and 6 minutes of simulation.

    python -m benchmarks.scaling

Every model runs under ZeRO 1 with expert parallelism over all GPUs, and with fp16 and recomputed activations, as the paper's
scripts have it; the micro-batch is the file's, or the largest divisor of it that the global batch allows. The simulation takes
the files as they are, with the overlay that each names in its head.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import ROOT, Benchmark, Part, Table
from nlgmoe.model.counting import count_parameters
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.topology import Topology, layout, read_settings

GPUS = (64, 128)


def spread(settings: dict[str, Any], gpus: int) -> Topology:
    """Return the files' run on `gpus` ranks."""
    data = settings["data"]
    micro_batch = math.gcd(data["micro_batch_size"], data["global_batch_size"] // gpus)
    given = {"gpus": gpus, "expert_parallel_size": gpus, "zero_stage": 1, "micro_batch_size": micro_batch}
    trainer = settings["trainer"] | {"precision": "16-mixed"}
    return layout(settings | {"trainer": trainer}, given | {"activation_checkpointing": True})


def paper_files() -> list[Path]:
    """Return the models of the paper."""
    folders = [ROOT / "configs" / family for family in ("dense", "moe", "pr_moe", "mos")]
    return [file for folder in folders for file in sorted(folder.glob("*.yaml")) if file.stem != "laptop"]


def predict(_: int) -> list[dict[str, Any]]:
    """Return size, memory and all-to-all of a rank of every model."""
    rows = []
    models = [(file.stem, *read_settings([str(file)])) for file in paper_files()]
    for name, config, settings in sorted(
        models, key=lambda model: (model[1].hidden_size, count_parameters(model[1]).total)
    ):
        for gpus in GPUS:
            topology, count = spread(settings, gpus), count_parameters(config)
            cost = estimate(config, topology)
            degrees = "/".join(str(degree) for degree in dict.fromkeys(topology.degrees(config)) if degree)
            row = {"model": name, "parameters": count.total, "active": count.active, "gpus": gpus, "degrees": degrees}
            row |= {"micro_batch_size": topology.micro_batch_size, "memory": cost.memory.total}
            row |= {"all_to_all": cost.communication.all_to_all}
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
        cells.append([both[0]["model"], *sizes, memory, sent])
    return ["64; 128 GPUs", "parameters", "active", "memory of a rank, GiB", "all-to-all, GiB/step"], cells


def simulate(_: int) -> list[dict[str, Any]]:
    """Return `nlgmoe inspect --simulate --json` of every model, each in a process of its own."""
    rows = []
    for file in paper_files():
        overlay = re.search(r"configs/hardware/gpus_\d+\.yaml", file.read_text())
        assert overlay is not None
        options = ["--micro-batch=4"] if "--data.micro_batch_size 4" in file.read_text() else []
        words = ["inspect", str(file), str(ROOT / overlay[0]), *options, "--simulate", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "nlgmoe", *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        report = json.loads(done.stdout)
        row = {name: report[name] for name in ("predicted", "simulated")}
        rows.append({"model": file.stem, "gpus": report["inputs"]["topology"]["gpus"]} | row)
    return rows


def simulated_table(rows: list[dict[str, Any]]) -> Table:
    cells: list[Any] = []
    for row in rows:
        predicted, found = row["predicted"], row["simulated"]
        sent = [values["bytes"] for values in (predicted, found)]
        apart = max(abs(sent[1][kind] / size - 1) if size else sent[1][kind] for kind, size in sent[0].items())
        peaks = [values["peak_bytes"] for values in (predicted, found)]
        cells.append(
            [row["model"], row["gpus"], *(f"{peak / 2**30:.2f}" for peak in peaks), f"{peaks[0] / peaks[1] - 1:+.1%}"]
        )
        cells[-1] += ["; ".join(f"{size / 1e9:.2f}" for size in sent[0].values()), f"{apart:.0e}"]
    head = ["model", "GPUs", "predicted peak, GiB", "simulated", "", "sent in a step, GB", "largest difference"]
    return head, cells


BENCHMARK = Benchmark(
    "scaling", "scaling.md", {"models": Part(predict, table), "simulated": Part(simulate, simulated_table)}
)

if __name__ == "__main__":
    BENCHMARK.run(__doc__)
