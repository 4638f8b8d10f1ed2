"""Rows: what one candidate's gate found, in a JSON file; and the table of docs/results/gate.md."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.documents import markdown_table, with_text
from benchmarks.gate.sides import BASELINES, PAPER, Side
from benchmarks.gate.verdict import AS_GOOD, CHANCE, PLANNED_PAIRS, in_words
from benchmarks.reproduce.cells import MARGIN
from benchmarks.reproduce.scale import machine
from benchmarks.runs import ROOT, commit, short
from benchmarks.timing import output_of
from nlgmoe.files import write_json
from nlgmoe.model.counting import count_parameters
from nlgmoe.versions import versions

RESULTS, PAGE = ROOT / "docs/results/gate.json", ROOT / "docs/results/gate.md"
BEGIN, END = "<!-- rows: python -m benchmarks.gate --tables -->", "<!-- end of rows -->"
KINDS = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal seconds"}
Row = dict[str, Any]


def make_row(candidate: Side, author: str | None, **measured: Any) -> Row:
    """Return a row: who, what and where; and what was measured."""
    count = count_parameters(candidate.config)
    return {
        "name": candidate.name,
        "author": author or output_of(["git", "config", "user.name"]) or "unknown",
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "command": f"python -m benchmarks.gate {shlex.join(sys.argv[1:])}",
        "scale": candidate.scale.name,
        "overlay": json.loads(candidate.overlays[-1]),
        "parameters": {"total": count.total, "active": count.active},
        **measured,
    }


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file, none if there is no file."""
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    return rows


def add_row(file: Path, row: Row) -> None:
    """Add a row to a file, in place of one of the same name, author and baseline."""
    others = [other for other in read_rows(file) if _key(other) != _key(row)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, [*others, row])


def _key(row: Row) -> tuple[str, str, str]:
    return row["name"], row["author"], baseline_of(row)


def baseline_of(row: Row) -> str:
    """Return the name of a row's baseline; the first rows name none."""
    return str(row.get("baseline", PAPER.name))


def in_lines(row: Row) -> str:
    """Return what the gate found, a verdict a line."""
    costs = row["costs"]
    cost = f"{costs['flops']:.2f} times the FLOPs a token, {costs['seconds']:.2f} times the seconds"
    lines = [f"{row['name']} beside {baseline_of(row)}: {cost}"]
    lines += [f"  {title + ':':<15}{in_words(row['verdicts'][kind])}" for kind, title in KINDS.items()]
    if row["verdicts"]["tokens"]["pairs"] < PLANNED_PAIRS:
        lines.append(f"  a first look: fewer than {PLANNED_PAIRS} pairs can say worse, or nothing")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Return a table with a line an idea and a column a baseline, of the verdicts at equal tokens."""
    of_idea: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        of_idea.setdefault((row["name"], row["author"]), {})[baseline_of(row)] = row
    names = [name for name in BASELINES if any(name in of for of in of_idea.values())]
    lines = [
        [name, author, *(_cell(of[base]["verdicts"]["tokens"]) if base in of else "" for base in names)]
        for (name, author), of in of_idea.items()
    ]
    return markdown_table(["idea, at equal tokens", "by", *(f"beside `{name}`" for name in names)], lines)


def table(rows: Sequence[Row]) -> str:
    """Return the tables of all rows."""
    head = [
        "idea",
        "baseline",
        "commit",
        "processor",
        "parameters (active)",
        "FLOPs",
        "seconds",
        *KINDS.values(),
        "pairs",
    ]
    lines = []
    for row in rows:
        size, costs, verdicts = row["parameters"], row["costs"], row["verdicts"]
        cells = [row["name"], baseline_of(row), short(row["commit"]), row["machine"].partition(",")[0]]
        cells += [f"{size['total'] / 1e6:.2f}M ({size['active'] / 1e6:.2f}M)"]
        cells += [f"{costs[kind]:.2f}" for kind in ("flops", "seconds")]
        lines.append([*cells, *(_cell(verdicts[kind]) for kind in KINDS), verdicts["tokens"]["pairs"]])
    text = f"{len(rows)} rows: if no idea changed the loss, {CHANCE * len(rows):.2f} of them would be better by chance."
    return f"{summary(rows)}\n\nAll verdicts, by row:\n\n{markdown_table(head, lines)}\n\n{text}"


def _cell(judged: dict[str, Any]) -> str:
    interval = "" if judged["low"] is None else f" ({judged['low']:+.3f} to {judged['high']:+.3f})"
    within = f" within {MARGIN}" if judged["reading"] == AS_GOOD else ""
    return f"**{judged['reading']}**{within} {judged['mean']:+.3f}{interval}"


def write_tables(text: str) -> None:
    """Replace the tables of docs/results/gate.md."""
    PAGE.write_text(with_text(PAGE.read_text(), BEGIN, END, text, name=str(PAGE)))
