"""What the campaign found: `docs/results/faults.json`, and the tables of `docs/results/faults.md` made of it."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.documents import with_text

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs/results/faults.json"
DOCUMENT = ROOT / "docs/results/faults.md"
BEGIN, END = "<!-- written by make test-faults: {} -->", "<!-- end -->"


def commit() -> str:
    """The short hash of the tree's commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


class Results:
    """Keeps each part of the campaign with its commit and date, so that a part may be run again alone."""

    def __init__(self, commit: str) -> None:
        self._commit = commit

    def add(self, part: str, found: dict[str, Any]) -> None:
        """Replace a part of the file, and the tables."""
        parts = json.loads(FILE.read_text()) if FILE.exists() else {}
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        parts[part] = {"commit": self._commit, "date": date, **found}
        FILE.write_text(json.dumps(dict(sorted(parts.items())), indent=1) + "\n")
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), parts))


def with_tables(document: str, parts: dict[str, Any]) -> str:
    """The document with the tables that belong to the results."""
    for name, lines in {
        "kills": _kills(parts),
        "two hosts": _hosts(parts),
        "disk full": _disks(parts),
        "soak": _soak(parts),
    }.items():
        document = with_text(document, BEGIN.format(name), END, "\n".join(["", *lines]))
    return document


def _kills(parts: dict[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        if not name.startswith("kills"):
            continue
        losses, where = part["undisturbed"], "one process" if name.endswith(" 1") else "two ranks"
        yield (
            f"**{len(part['kills'])} kills, {where}.** Seed {part['seed']}, commit {part['commit']}, {part['date']}. "
            f"Undisturbed: training loss {losses['train_loss']!r}, validation loss {losses['val_loss']!r}."
        )
        yield ""
        other = [] if name.endswith(" 1") else ["the other rank"]
        yield from _row(
            ["run", "killed", "moment", "newest step, before and after", "left behind", *other], header=True
        )
        for kill in part["kills"]:
            left = ", ".join(re.sub(r"-\d+$", "", each) for each in kill["leftovers"])
            seconds = kill["survivor_seconds"]
            other = [] if name.endswith(" 1") else ["" if seconds is None else f"error after {seconds} s"]
            yield from _row(
                [kill["run"], kill["victims"], kill["happened"], f"{kill['had']}, {kill['newest']}", left, *other]
            )
        yield ""
        yield from _row(
            [
                "run",
                "kills",
                "training loss",
                "validation loss",
                "largest difference",
            ],
            header=True,
        )
        for run in part["runs"]:
            row = [run["run"], run["kills"], run["train_loss"], run["val_loss"]]
            yield from _row([*row, _difference(run["largest_difference"])])
        yield ""


def _hosts(parts: dict[str, Any]) -> Iterator[str]:
    columns = ["", "the rest ended after", "`timeout_seconds`", "went on from step", "largest difference at the end"]
    yield from _row(columns, header=True)
    for name, part in parts.items():
        if name.startswith("two hosts"):
            seconds = f"{part['seconds']} s" if "seconds" in part else ""
            steps = ", ".join(map(str, part.get("resumed_from", [])))
            yield from _row(
                [
                    name.removeprefix("two hosts, "),
                    seconds,
                    part.get("timeout_seconds", ""),
                    steps,
                    _difference(part["largest_difference"]),
                ]
            )


def _disks(parts: dict[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        if name.startswith(("disk full", "no folder")):
            yield from [f"    # {name}", *(f"    error: {error}" for error in part["errors"])]


def _soak(parts: dict[str, Any]) -> Iterator[str]:
    if (part := parts.get("soak")) is None:
        yield "Not run for two hours yet."
        return
    largest = max(part["differences"].values(), default=0.0)
    yield (
        f"{part['minutes']:.0f} minutes, {part['steps']} steps, {part['kills']} kills. Commit {part['commit']}, "
        f"{part['date']}. Largest difference between the two at the end: {_difference(largest)}."
    )
    yield ""
    yield from _row(["run", "lives of a process", "growth of memory", "more open files", "memory, MB"], header=True)
    for name in ("undisturbed", "killed"):
        used = part[name]
        growth = "too brief" if used["growth"] is None else f"{used['growth']:+.1%}"
        megabytes = f"{used['peak_bytes'] / 1e6:.0f}"
        yield from _row([name, used["lives"], growth, used["more_files"], megabytes])


def _difference(value: float) -> str:
    return f"{value:.1e}" if value else "none"


def _row(cells: Sequence[Any], header: bool = False) -> Iterator[str]:
    yield f"| {' | '.join(map(str, cells))} |"
    if header:
        yield f"|{'---|' * len(cells)}"
