"""How costs grow: exponents of power laws, fitted to what other benchmarks have measured; the table in docs/results/performance.md.

    python -m benchmarks.growth

`cost ~ size ** exponent`, by least squares over the logarithms of all sizes, and over the larger half of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.documents import with_text
from benchmarks.timing import ROOT

DOCUMENT = ROOT / "docs/results/performance.md"
BEGIN, END = "<!-- written by python -m benchmarks.growth -->", "<!-- end -->"
Points = dict[float, float]  # size -> cost


def exponent(points: Points) -> float:
    """Slope of the logarithm of costs over that of sizes."""
    sizes, costs = np.log(list(points)), np.log(list(points.values()))
    return float(np.polyfit(sizes, costs, 1)[0])


def measured(folder: Path) -> Iterator[tuple[str, str, Points]]:
    """Yield what costs, what grows, and the measured points."""

    def read(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        return found

    for name, points in read("step")["growth"].items():
        of = {"experts": "experts, one a token", "sequence length": "sequence length, tokens a step the same"}
        yield (
            "a training step",
            of.get(name, name),
            {float(size): each for size, each in points.items() if size != "dense"},
        )
    ranks = {"alone": 1.0, "degree 2": 2.0}
    seconds = {
        size: float(np.median(read("expert_parallel")["seconds_per_step"][name])) for name, size in ranks.items()
    }
    yield "a training step", "ranks, degree as many, tokens of a rank the same", seconds
    corpora = {
        float(name.partition(" ")[0].replace(",", "")): found
        for name, found in read("indexed_data").items()
        if name.endswith("tokens")
    }
    for label, key in {
        "to open a corpus": "open_seconds",
        "the first batch": "first_batch_seconds",
        "a sample": "sample_microseconds",
        "a process's own memory": "anonymous_mb",
    }.items():
        yield label, "tokens of the corpus", {tokens: found[key] for tokens, found in corpora.items()}
    checkpoints = [
        found for found in read("checkpoint").values() if isinstance(found, dict) and "tensor_bytes" in found
    ]
    for where in ("one process", "two ranks"):
        for verb, key in {"to save": "write_mb_per_s", "to load": "read_mb_per_s"}.items():
            points = {found["tensor_bytes"]: found["tensor_bytes"] / 1e6 / found[where][key] for found in checkpoints}
            yield f"{verb} a checkpoint, {where}", "bytes of its tensors", points


def table(folder: Path) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| cost of | against | from, to | exponent | of the larger half |"
    yield "|---|---|---|---|---|"
    for cost, against, points in measured(folder):
        larger = dict(list(points.items())[len(points) // 2 :]) if len(points) > 3 else {}
        upper = f"{exponent(larger):.2f}" if len(larger) > 1 else ""
        yield f"| {cost} | {against} | {min(points):,.0f}, {max(points):,.0f} | {exponent(points):.2f} | {upper} |"


def main() -> None:
    """Write the table."""
    lines = list(table(ROOT / "docs/results"))
    DOCUMENT.write_text(with_text(DOCUMENT.read_text(), BEGIN, END, "\n".join(["", *lines])))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
