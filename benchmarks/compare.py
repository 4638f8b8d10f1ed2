"""Does a PR-MoE beat a dense model of equal FLOPs per token on equal tokens? `make compare` answers.

Trains the laptop twins `configs/dense/laptop.yaml` and `configs/pr_moe/laptop.yaml` for each seed. A seed fixes the data
order and the initial dense part of both models, so the runs come in pairs, and the difference within pairs is what counts:
seed noise that both share cancels. Each run has one thread; runs that are finished are not repeated.

    python -m benchmarks.compare [--seeds 0 1 2] [--jobs 2] [--tokens N] [--out runs/compare]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.runs import ROOT, budget, mean_and_error, train
from nlgmoe import load_config
from nlgmoe.model.counting import count_parameters, flops_per_token

MODELS = ("dense", "pr_moe")


def train_model(model: str, seed: int, tokens: int | None, learning_rate: float | None, out: Path) -> dict:
    """One model with one seed; these runs keep no checkpoints."""
    folder = out / f"{model}-{seed}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted comparison left
    settings = {
        "model.seed": seed,
        "data.seed": seed,
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.callbacks": "null",
        **budget(tokens),
    }
    if learning_rate is not None:
        settings |= {"model.optimizer.lr": learning_rate, "model.schedule.min_lr": learning_rate / 10}
    return train(f"configs/{model}/laptop.yaml", folder, settings)


def main() -> None:
    """Train, print the table, write `compare.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--tokens", type=int, default=None, help="tokens per run instead of the configuration's")
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate instead of the configuration's")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()

    configs = {name: load_config(ROOT / "configs" / name / "laptop.yaml").module.config for name in MODELS}
    flops = {name: flops_per_token(config) for name, config in configs.items()}
    assert abs(flops["dense"] / flops["pr_moe"] - 1) < 0.01, f"not equal FLOPs per token: {flops}"

    runs = [(model, seed) for seed in args.seeds for model in MODELS]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda run: train_model(*run, args.tokens, args.lr, args.out.resolve()), runs))
    summaries = dict(zip(runs, results, strict=True))

    table = {}
    print(
        f"\n{'model':<8} {'total':>8} {'active':>8} {'MFLOP/token':>12} {'tokens':>10} {'val loss':>17} {'tokens/s':>9}"
    )
    for model in MODELS:
        own = [summaries[model, seed] for seed in args.seeds]
        loss, error = mean_and_error([summary["val_loss"] for summary in own])
        count = count_parameters(configs[model])
        speed = statistics.median(summary["tokens_per_second"] for summary in own)
        table[model] = {
            "val_loss": loss,
            "standard_error": error,
            "tokens": own[0]["tokens"],
            "params_total": count.total,
            "params_active": count.active,
            "flops_per_token": flops[model],
            "tokens_per_second": speed,
            "unigram_entropy": own[0]["unigram_entropy"],
            "bits_per_byte": [summary["bits_per_byte"] for summary in own],
            "by_seed": {seed: summaries[model, seed]["val_loss"] for seed in args.seeds},
        }
        print(
            f"{model:<8} {count.total / 1e6:>7.2f}M {count.active / 1e6:>7.2f}M {flops[model] / 1e6:>12.2f} "
            f"{own[0]['tokens']:>10,} {loss:>8.4f} ± {error:.4f} {speed:>9,.0f}"
        )
    differences = [summaries["dense", s]["val_loss"] - summaries["pr_moe", s]["val_loss"] for s in args.seeds]
    gain, error = mean_and_error(differences)
    table["dense_minus_pr_moe"] = {"mean": gain, "standard_error": error, "by_seed": differences}
    print(f"\ndense - pr_moe, paired by seed: {gain:.4f} ± {error:.4f} nats ({gain / error:.1f} standard errors)")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compare.json").write_text(json.dumps(table, indent=2) + "\n")
    print(f"written to {args.out / 'compare.json'}")


if __name__ == "__main__":
    main()
