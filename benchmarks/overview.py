"""Draw docs/results/overview.png, the README's figure, from compare.json and mos.json: `python -m benchmarks.overview`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main() -> None:
    """Draw the validation loss of each seed, joined within pairs, and the means."""
    compare, mos = (json.loads((RESULTS / name).read_text()) for name in ("compare.json", "mos.json"))
    panels = {
        "2.1M active parameters, 1.5M tokens": {
            "dense GPT": list(compare["dense"]["by_seed"].values()),
            "PR-MoE 16/16/32": list(compare["pr_moe"]["by_seed"].values()),
        },
        "Mixture-of-Students: PR-MoE 16/32, 1.5M tokens": {
            "alone": mos["alone"]["val_loss"],
            "distilled,\nstaged": mos["staged"]["val_loss"],
            "distilled\nto the end": mos["full"]["val_loss"],
        },
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), width_ratios=[2, 3], layout="constrained")
    for ax, (title, models) in zip(axes, panels.items(), strict=True):
        for pair in zip(*models.values(), strict=True):
            ax.plot(range(len(models)), pair, color="0.7", marker="o", markersize=4, linewidth=1)
        means = [mean(losses) for losses in models.values()]
        ax.plot(range(len(models)), means, "_", color="tab:orange", markersize=40, markeredgewidth=3)
        for place, value in enumerate(means):
            ax.annotate(f"{value:.2f}", (place, value), (22, 0), textcoords="offset points", va="center")
        ax.set_xticks(range(len(models)), models)
        ax.set_xlim(-0.5, len(models) - 0.3)
        ax.set_title(title, fontsize=10)
        ax.set_ylabel("validation loss (nats/token)")
        ax.grid(axis="y", alpha=0.3)
    figure.savefig(RESULTS / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
