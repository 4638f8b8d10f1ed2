"""Which experts to keep: use, REAP and first order beside random ones, before and after healing.

    python -m benchmarks.pruning runs/quickstart --batches 8 --heal 20 --windows 20
    python -m benchmarks.pruning mixture --seeds 4 --batches 2 --heal 4 --windows 2 --rate 5e-5     # of docs/fine_tune.md

For each seed a ranking of every criterion is measured on training text of its own order; half of the experts of every layer are
routed around, which equals `nlgmoe prune` (tests/eval/test_interventions.py), and the loss of the same validation text is
measured; then the model is healed: a few steps of AdamW on that text, the same for all criteria. The rule, which was committed
before the first run: a criterion is better than another at 95% if the interval of the paired difference of losses, over seeds,
excludes 0 (t distribution).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from benchmarks.runs import commit, processor
from nlgmoe.batch import loss_mask
from nlgmoe.checkpoint.reading import run_config
from nlgmoe.config import GPTConfig
from nlgmoe.eval.causes import first_order
from nlgmoe.eval.importance import measure_use
from nlgmoe.eval.interventions import remove_experts
from nlgmoe.eval.loaded_model import load_pretrained
from nlgmoe.eval.perplexity import read_batch
from nlgmoe.experiment import ONE_PROCESS, load_config
from nlgmoe.files import write_json
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import moe_blocks
from nlgmoe.surgery.prune import best_ranked, pruned_config

CRITERIA = ("use", "reap", "first_order", "random")


def rankings(model: GPT, batches: Sequence[Any], seed: int) -> dict[str, list[Tensor]]:
    """Return the scores `[E]` of each MoE layer by criterion."""
    use, changes = measure_use(model, batches), first_order(model, batches).layers
    generator = torch.Generator().manual_seed(seed)
    return {
        "use": use.weights,
        "reap": use.saliency,
        "first_order": [torch.from_numpy(change.mean()) for change in changes],
        "random": [torch.rand(len(weights), generator=generator) for weights in use.weights],
    }


def heal(model: GPT, batches: Sequence[Any], rate: float) -> None:
    """Train on each batch once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for batch in batches:
        output = read_batch(model, batch)
        hidden, counted = output.hidden.flatten(0, 1), loss_mask(batch).flatten()
        size = model.config.vocab_size
        loss = cross_entropy(hidden, model.unembedding, size, batch["targets"].flatten(), counted, 1024)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def half_of(config: GPTConfig) -> GPTConfig:
    numbers = config.moe.num_experts if config.moe is not None else 0
    counts = moe_blocks(config).values()
    return pruned_config(config, [n // 2 for n in numbers] if isinstance(numbers, list) else [n // 2 for n in counts])


def measure(source: str, seeds: int, measured: int, healing: int, windows: int, rate: float) -> dict[str, Any]:
    """Return the losses by criterion and seed."""
    loaded, config = load_pretrained(source), run_config(Path(source))
    assert config is not None
    settings: dict[str, Any] = {**ONE_PROCESS, "trainer__accelerator": "cpu", "trainer__logger": False}
    losses: dict[str, Any] = {name: {"before": [], "after": []} for name in CRITERIA}
    model = loaded.model.float()
    after = half_of(model.config)
    whole = None
    for seed in range(1, seeds + 1):
        data = load_config(config, **settings, data__max_eval_windows=windows, data__seed=1000 + seed).data
        data.prepare_data()
        batches = list(islice(data.train_dataloader(), measured + healing))
        validation = list(data.val_dataloader())
        whole = measure_use(model, validation).loss if whole is None else whole
        for name, scores in tqdm(rankings(model, batches[:measured], seed).items(), f"seed {seed}"):
            kept = best_ranked(scores, after)
            counts = enumerate(moe_blocks(model.config).values())
            removed = {layer: sorted({*range(count)} - {*kept[layer]}) for layer, count in counts}
            pruned = copy.deepcopy(model)
            remove_experts(pruned, removed)
            losses[name]["before"].append(measure_use(pruned, validation).loss)
            heal(pruned, batches[measured:], rate)
            losses[name]["after"].append(measure_use(pruned, validation).loss)
        print_table(losses, whole)
    tokens = {
        "measured": measured,
        "healing": healing,
        "batch": list(batches[0]["tokens"].shape),
        "windows": windows,
        "rate": rate,
    }
    return {
        "source": source,
        "whole": whole,
        "losses": losses,
        "batches": tokens,
        "commit": commit(),
        "processor": processor(),
    }


def print_table(losses: dict[str, Any], whole: float) -> None:
    """Print the mean losses, and their difference to `use` with its 95% interval."""
    print(f"all experts: {whole:.4f}\n{'':<14}{'before healing':>16} {'minus use':>20} {'after':>10} {'minus use':>20}")
    for name, by_time in losses.items():
        cells = []
        for time in ("before", "after"):
            values = np.array(by_time[time])
            difference = (
                values - np.array(losses["use"][time])[: len(values)]
                if len(values) <= len(losses["use"][time])
                else values
            )
            count = len(values)
            half = stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / count**0.5 if count > 1 else float("nan")
            cells.append(f"{values.mean():>10.4f} {difference.mean():>+10.4f} ± {half:.4f}")
        print(f"{name:<14}{'   '.join(cells)}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run folder or checkpoint of a mixture")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batches", type=int, default=16, help="micro-batches on which criteria are measured")
    parser.add_argument("--heal", type=int, default=40, help="micro-batches of healing, one a step")
    parser.add_argument("--rate", type=float, default=3e-4, help="of AdamW in healing, without decay")
    parser.add_argument("--windows", type=int, default=40, help="validation windows of each domain")
    parser.add_argument("--output", default="docs/results/pruning.json", help="JSON file, to which the source is added")
    words = parser.parse_args()
    result = measure(words.source, words.seeds, words.batches, words.heal, words.windows, words.rate)
    file = Path(words.output)
    results = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, results | {Path(words.source).name: result})


if __name__ == "__main__":
    main()
