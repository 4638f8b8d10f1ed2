"""Charts of expert specialisation by domain and token class, per layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nlgmoe.eval.specialisation import Specialisation, entropy, mutual_information, overlap, preference
from nlgmoe.tools.report.drawing import RATIO_MAX, Chart, Panel, bar, ratio_heat_map
from nlgmoe.tools.report.runs import Run

MAX_NAMED = 40  # experts with names on the axis


def specialisation(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts that the runs have data for."""
    known = [(run, run.specialisation) for run in runs if run.specialisation is not None]
    if not known:
        return []
    charts = [_information(known), *_overlaps(known), *(_preferences(run, counted) for run, counted in known)]
    return charts


def _information(known: Sequence[tuple[Run, Specialisation]]) -> Chart:
    """Return the mutual information of expert and domain or class, a bar per run and layer."""
    domains, classes = [], []
    for run, counted in known:
        layers = range(len(counted.experts))
        names = [run.layer(layer) for layer in layers]
        domains.append(bar(run, names, [mutual_information(counted.by_domain(layer)) for layer in layers]))
        classes.append(bar(run, names, [mutual_information(counted.by_class(layer)) for layer in layers]))
    limits = [
        f"{run.name}: domain {entropy(counted.by_domain(0)):.2f}, class {entropy(counted.by_class(0)):.2f}"
        for run, counted in known
    ]
    text = (
        "Mutual information of the chosen expert and the token's domain or class: 0 for experts without preferences; the upper "
        f"bounds are {'; '.join(limits)} bits."
    )
    layout = {"yaxis": {"title": {"text": "bits"}, "rangemode": "tozero"}}
    panels = [Panel("about the domain", domains, layout), Panel("about the class of token", classes, layout)]
    return Chart("information", "How specialised experts are (bits)", text, panels, 480)


def _overlaps(known: Sequence[tuple[Run, Specialisation]]) -> list[Chart]:
    """Return the overlap of routings with the first run, a bar per run and shared layer; layers are shared from the last one."""
    (first, reference), bars = known[0], []
    for run, compared in known[1:]:
        if (reference.domains, reference.classes) != (compared.domains, compared.classes):
            continue
        shares: dict[str, float] = {}
        for back in range(min(len(reference.experts), len(compared.experts)), 0, -1):
            mine, theirs = len(reference.experts) - back, len(compared.experts) - back
            if reference.experts[mine] == compared.experts[theirs]:
                shares[run.layer(theirs)] = overlap(reference.by_cell(mine), compared.by_cell(theirs))
        if shares:
            bars.append(bar(run, list(shares), shares.values()))
    text = (
        f"Share of assignments that go to the same experts as in {first.name}, by domain and class of token; layers are "
        "compared from the last one backwards. Experts of two runs correspond only if one started from the other's weights."
    )
    panel = Panel("", bars, {"yaxis": {"title": {"text": "share"}, "range": [0, 1]}})
    return [Chart("overlap", f"Routings alike to {first.name}", text, [panel])] if bars else []


def _preferences(run: Run, counted: Specialisation) -> Chart:
    """Return the heat maps of groups and experts of a run, two panels per layer."""
    panels = []
    for layer in range(len(counted.experts)):
        halves = {
            "domain": (counted.domains, counted.by_domain(layer)),
            "class of token": (counted.classes, counted.by_class(layer)),
        }
        panels += [
            _preference(f"{run.layer(layer)}: {kind}", np.array(names), counts)
            for kind, (names, counts) in halves.items()
            if counts.any()
        ]
    step = "" if counted.step is None else f" after {counted.step:,} steps"
    text = (
        f"Validation text{step}: a group's share of assignments to an expert, relative to the share of all tokens. White is no "
        f"preference, red more (dark red {RATIO_MAX:g} times and above), blue less, black none; grey: an unused expert. "
        "Experts are sorted by the group that prefers them."
    )
    title = f"What experts are used for (times the share of all tokens): {run.name}"
    return Chart(f"preference-{run.key}", title, text, panels, 480)


def _preference(title: str, names: np.ndarray, counts: np.ndarray) -> Panel:
    """Return a heat map of preferences.

    Args:
        title: of the panel.
        names: `[G]` names of domains or classes.
        counts: `[G, E]` assignments.
    """
    seen = counts.sum(axis=1) > 0
    names, counts = names[seen], counts[seen]
    ratio = preference(counts)  # [G, E]
    known = np.nan_to_num(ratio, nan=-1.0)
    order = np.lexsort((-known.max(axis=0), known.argmax(axis=0), np.isnan(ratio).all(axis=0)))  # [E]
    shares = counts / counts.sum(axis=1, keepdims=True)
    details = [
        [[int(expert), round(float(row[expert]), 4), int(tokens[expert])] for expert in order]
        for row, tokens in zip(shares, counts, strict=True)
    ]
    heat_map = ratio_heat_map(ratio[:, order]) | {
        "y": names.tolist(),
        "customdata": details,
        "hovertemplate": "%{y}, expert %{customdata[0]}: %{z:.2f} times the share of all tokens<br>%{customdata[1]:.1%} of the "
        "group, %{customdata[2]:,} tokens<extra></extra>",
    }
    axis = {"showgrid": False, "title": {"text": "expert", "standoff": 4}, "tickangle": 0, "tickfont": {"size": 9}}
    axis |= {"tickvals": list(range(len(order))), "ticktext": [str(expert) for expert in order]}
    axis["showticklabels"] = len(order) <= MAX_NAMED
    layout = {"xaxis": axis, "yaxis": {"autorange": "reversed", "showgrid": False}, "plot_bgcolor": "#D9DEE4"}
    return Panel(title, [heat_map], layout, max(130, 24 * len(names)) + 60)
