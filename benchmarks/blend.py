"""How far the parts of a blend get from their shares: ours, and always taking the part that is furthest behind, as Megatron does.

python -m benchmarks.blend
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import yaml

from benchmarks.timing import ROOT
from nlgmoe.data.blend import Interleaving, integer_weights

SAMPLES = 60_000


def worst_distance(weights: Sequence[int], part_of: Callable[[int, list[int]], int]) -> float:
    """The largest distance of any part from its share at any of the first `SAMPLES` samples, in samples."""
    counts, total, worst = [0] * len(weights), sum(weights), 0.0
    for sample in range(SAMPLES):
        counts[part_of(sample, counts)] += 1
        worst = max(worst, *(abs(n - (sample + 1) * w / total) for n, w in zip(counts, weights, strict=True)))
    return worst


def furthest_behind(weights: Sequence[int], sample: int, counts: list[int]) -> int:
    """The part that lacks most of its share once this sample is taken."""
    behind = [weight / sum(weights) * max(sample, 1) - count for weight, count in zip(weights, counts, strict=True)]
    return behind.index(max(behind))


def main() -> None:
    blend = yaml.safe_load((ROOT / "configs/data/paper_blend.yaml").read_text())
    paper = [part["weight"] for part in blend["data"]["corpus"]["init_args"]["parts"]]
    for name, given in {"the paper's 15": paper, "1,000 and ten of 1": [1000.0] + [1.0] * 10}.items():
        weights = integer_weights(given)
        ours = Interleaving(weights)
        print(
            f"{name}: ours {worst_distance(weights, lambda sample, _, ours=ours: ours.place(sample)[0]):.2f} samples, furthest "
            f"behind {worst_distance(weights, lambda sample, counts, w=weights: furthest_behind(w, sample, counts)):.2f}"
        )


if __name__ == "__main__":
    main()
