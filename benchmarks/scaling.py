"""The paper's models on the paper's GPUs, predicted: the tables of docs/results/scaling.md. Needs no GPU, and a minute.

    python benchmarks/scaling.py

Prints them and writes docs/results/scaling.json. Every model runs under ZeRO 1 with expert parallelism over all GPUs, and with
fp16 and recomputed activations, as the paper's scripts have it; the micro-batch is the file's, or the largest divisor of it that
the global batch allows.
"""

import json
import math
from pathlib import Path

from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import count_parameters
from nlgmoe.monitoring.hardware import HARDWARE, Hardware
from nlgmoe.tools.planner.cost import UTILISATION, Cost, estimate, fits_on
from nlgmoe.tools.planner.inspect_config import layout, read_settings
from nlgmoe.tools.planner.topology import Topology

ROOT = Path(__file__).parents[1]
FAMILIES = ("dense", "moe", "pr_moe", "mos")
GPUS = (64, 128)
A100S = ("a100-40", "a100-80")
HEADER = ["model", "parameters", "active", "GPUs", "degrees", "micro-batch", "weights (GiB)", "gradients", "Adam"]
HEADER += ["activations", "buckets", "total", "fits", "all-to-all (GiB/step)", "tokens/s"]
PAPER = {"6.7b_dense": 70, "1.3b_moe_128": 372}  # samples/s on 128 A100s (arXiv 2201.05596, section 3.3)


def spread(settings: dict, gpus: int) -> Topology:
    """The files' run on `gpus` ranks."""
    data = settings["data"]
    micro_batch = math.gcd(data["micro_batch_size"], data["global_batch_size"] // gpus)
    given = {"gpus": gpus, "expert_parallel_size": gpus, "zero_stage": 1, "micro_batch_size": micro_batch}
    given["activation_checkpointing"] = True
    trainer = settings["trainer"] | {"precision": "16-mixed"}
    return layout(settings | {"trainer": trainer}, given)


def calibrated(config: GPTConfig, topology: Topology, gpu: Hardware, samples_per_second: float) -> float:
    """The utilisation at which the model predicts this rate, by bisection."""
    low, high = 1e-3, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        slower = estimate(config, topology, gpu, middle).samples_per_second < samples_per_second
        low, high = (middle, high) if slower else (low, middle)
    return low


def row(name: str, config: GPTConfig, topology: Topology, cost: Cost) -> str:
    """One line of the table, in Markdown."""
    count, memory = count_parameters(config), cost.memory
    degrees = "/".join(str(degree) for degree in dict.fromkeys(topology.degrees(config)) if degree) or "-"
    fits = next((kind for kind in A100S if fits_on(memory, HARDWARE[kind])), "neither")
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buckets, memory.total)
    cells = [name, f"{count.total / 1e9:.2f} B", f"{count.active / 1e9:.2f} B", topology.gpus, degrees]
    cells += [topology.micro_batch_size, *(f"{part / 2**30:.1f}" for part in parts), fits]
    cells += [f"{cost.communication.all_to_all / 2**30:.2f}", f"{cost.tokens_per_second / 1e6:.2f} M"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print and write the tables."""
    gpu, results = HARDWARE["a100-40"], []
    files = [
        file for family in FAMILIES for file in (ROOT / "configs" / family).glob("*.yaml") if file.stem != "laptop"
    ]
    read = {file.stem: read_settings([str(file)]) for file in files}
    models = dict(sorted(read.items(), key=lambda item: (item[1][0].hidden_size, count_parameters(item[1][0]).total)))
    print(f"| {' | '.join(HEADER)} |")
    print("|---" * len(HEADER) + "|")
    for name, (config, settings) in models.items():
        for gpus in GPUS:
            topology = spread(settings, gpus)
            cost = estimate(config, topology, gpu)
            print(row(name, config, topology, cost))
            result = {"model": name, "gpus": gpus, "micro_batch_size": topology.micro_batch_size}
            result |= {"memory": cost.memory.total, "tokens_per_second": cost.tokens_per_second}
            results.append(result | {"all_to_all": cost.communication.all_to_all})

    dense, moe = ((models[name][0], spread(models[name][1], 128)) for name in PAPER)
    paper_dense, paper_moe = PAPER.values()
    validation = []
    for utilisation in (calibrated(*dense, gpu, paper_dense), UTILISATION):
        rates = [estimate(*model, gpu, utilisation).samples_per_second for model in (dense, moe)]
        ratio = rates[1] / rates[0]
        validation.append({"utilisation": utilisation, "dense": rates[0], "moe": rates[1], "ratio": ratio})
        print(f"utilisation {utilisation:.3f}: {rates[0]:.0f} and {rates[1]:.0f} samples/s, {ratio:.2f}x")
    print(f"paper: {paper_dense} and {paper_moe} samples/s, {paper_moe / paper_dense:.2f}x")
    target = ROOT / "docs" / "results" / "scaling.json"
    target.write_text(json.dumps({"models": results, "validation": validation}, indent=2) + "\n")


if __name__ == "__main__":
    main()
