"""The search for the strong baseline: `python -m benchmarks.gate --search`. List, order and rule were committed before any run.

It begins with MoE-16 under Muon. The factors are tried in the order of `FACTORS`, each over all that were kept before it, on
seeds 101 and 102, which no pair and no claim uses, at the learning rate of the paper's baseline. A factor is kept if

    its mean change of the final validation loss, paired by seed, is below -0.02 nats,
    a token has the same FLOPs within 2%, so that runs of equal tokens are runs of equal FLOPs, and
    a training step takes at most 1.15 times as long; a factor that costs more is not trained.

Then one search of the learning rate: 0.5, 1 and 2 times that rate; while the lowest mean loss is at an end, one rate more beyond
it, twice at most. The rate is the minimum of the parabola through the three around the lowest, as for the claims.

The search claims nothing: the best of several tries looks better than it is. `configs/gate/strong.yaml` is its outcome, and one
row of eight pairs compares it with Muon alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gate.candidate import costs
from benchmarks.gate.records import Records
from benchmarks.gate.runs import placed, trained_pairs
from benchmarks.gate.sides import MUON, Side
from benchmarks.gate.verdict import SAME_COST
from benchmarks.reproduce.campaign import best_rate
from benchmarks.reproduce.cells import MARGIN
from benchmarks.reproduce.scale import Scale
from benchmarks.training import Launcher
from nlgmoe.validation import require

SEEDS, SLOWEST, RATES, MORE = (101, 102), 1.15, (0.5, 1.0, 2.0), 2
FACTORS: dict[str, dict[str, Any]] = {
    # The parts of a modern block
    "qk_norm": {"config": {"qk_norm": "head"}},
    "rotary": {"config": {"rope_theta": 10_000.0}},
    "rmsnorm": {"config": {"norm": "rmsnorm"}},
    "swiglu": {"config": {"ffn_network": "swiglu", "ffn_hidden_size": 86}},  # 1.01 times the FLOPs of GELU with 128
    "no_bias": {"config": {"bias": False}},
    # Shape: half the blocks
    "wide": {"config": {"num_layers": 8, "hidden_size": 44, "ffn_hidden_size": 204}},
    # Experts: 32 of a quarter of the width, four a token
    "fine_grained": {"config": {"moe": {"num_experts": 32, "top_k": 4, "expert_ffn_size": 32}}},
    "sigmoid_bias": {
        "config": {"moe": {"router": {"class_path": "nlgmoe.SigmoidRouterConfig", "init_args": {"update_rate": 0.001}}}}
    },
    "z_loss": {"config": {"moe": {"z_loss_coeff": 0.001}}},
    # Optimizer and schedule
    "weight_decay": {"optimizer": {"weight_decay": 0.3}},
    "cooldown": {"schedule": {"cooldown_tokens": 1_966_080}},  # the last 40%
}
# Together with others, a factor has the same FLOPs by another width; of several lines that hold, the last counts.
TOGETHER: tuple[tuple[set[str], dict[str, Any]], ...] = (
    ({"swiglu", "wide"}, {"config": {"ffn_hidden_size": 136}}),
    ({"swiglu", "fine_grained"}, {"config": {"moe": {"expert_ffn_size": 21}}}),
    ({"wide", "fine_grained"}, {"config": {"moe": {"expert_ffn_size": 51}}}),
    ({"swiglu", "wide", "fine_grained"}, {"config": {"moe": {"expert_ffn_size": 34}}}),
)


def overlays_of(factors: list[str]) -> tuple[str, ...]:
    """Return the overlays of factors."""
    shared = [settings for names, settings in TOGETHER if names <= {*factors}]
    return tuple(json.dumps({"model": settings}) for settings in (*(FACTORS[name] for name in factors), *shared))


def search(records: Records, scale: Scale, out: Path, jobs: int, launch: Launcher) -> tuple[list[str], float]:
    """Train what is missing of the search, print each outcome, and return the kept factors and the learning rate."""
    best, kept = placed(Side("search-start", scale, MUON), out, launch), list[str]()
    numerics, whole = best.fingerprint, [(scale.steps, scale.steps)]

    def change(side: Side) -> float:
        """Return the mean change of the loss from that of the best so far, paired by seed."""
        pairs = trained_pairs((side, best), SEEDS, whole, records, numerics, jobs, launch).values()
        return sum(own[scale.steps] - other[scale.steps] for own, other in pairs) / len(SEEDS)

    for factor in FACTORS:
        side = placed(Side(f"search-{factor}", scale, MUON, overlays_of([*kept, factor])), out, launch)
        if not records.costs_of(side, numerics):
            records.add_costs(side, numerics, costs(side, best))
        cost = records.costs_of(side, numerics)
        require(abs(cost["flops"] - 1) <= SAME_COST, f"{factor}: {cost['flops']:.3f} times the FLOPs")
        words = f"{factor}: {cost['seconds']:.2f} times the seconds"
        if cost["seconds"] > SLOWEST:
            print(f"{words}: not trained", flush=True)
            continue
        difference = change(side)
        print(f"{words}, {difference:+.4f} nats: {'kept' if difference < -MARGIN else 'not kept'}", flush=True)
        if difference < -MARGIN:
            best, kept = side, [*kept, factor]
    changes, wanted = {best.learning_rate: 0.0}, [factor * best.learning_rate for factor in RATES if factor != 1]
    for _ in range(1 + MORE):
        for rate in wanted:
            changes[rate] = change(placed(replace(best, name="search-rate", rate=rate), out, launch))
        rates = sorted(changes)
        lowest = min(rates, key=changes.__getitem__)
        wanted = [lowest / 2] if lowest == rates[0] else [lowest * 2] if lowest == rates[-1] else []
    middle = min(max(rates.index(lowest), 1), len(rates) - 2)
    around = rates[middle - 1 : middle + 2]
    rate = best_rate(around, [changes[rate] for rate in around])
    print(f"learning rate: {rate:.3g}, from the changes {changes}", flush=True)
    return kept, rate
