"""Charts of expert specialisation by domain and token class, per layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from nlgmoe.eval.specialisation import Specialisation, entropy, mutual_information, overlap, preference
from nlgmoe.tools.report.drawing import RATIO_MAX, Chart, grid_cell, panel_grid, ratio_heat_map, run_colour
from nlgmoe.tools.report.runs import Run

MAX_NAMED = 40  # experts with names on the axis


def information(runs: Sequence[Run]) -> Chart | None:
    """Return the mutual information of expert and domain or class, a bar per run and layer."""
    known = [(number, run, run.specialisation) for number, run in enumerate(runs) if run.specialisation is not None]
    if not known:
        return None
    limits = [
        f"{run.name}: domain {entropy(found.by_domain(0)):.2f}, class {entropy(found.by_class(0)):.2f}"
        for _, run, found in known
    ]
    figure = panel_grid(["about the domain", "about the class of token"], 2, 230)
    for number, run, found in known:
        layers = range(len(found.experts))
        for column, groups in enumerate((found.by_domain, found.by_class)):
            bits = [round(mutual_information(groups(layer)), 4) for layer in layers]
            figure.add_bar(
                x=[run.layer(layer) for layer in layers],
                y=bits,
                name=run.name,
                legendgroup=run.name,
                showlegend=column == 0 and len(known) > 1,
                marker_color=run_colour(number),
                hovertemplate="%{y:.3f} bits",
                **grid_cell(column, 2),
            )
    figure.update_yaxes(title="bits", rangemode="tozero")
    text = (
        "Mutual information of the chosen expert and the token's domain or class: 0 for experts without preferences; the upper "
        f"bounds are {'; '.join(limits)} bits."
    )
    return Chart("information", "How specialised experts are (bits)", text, figure)


def overlaps(runs: Sequence[Run]) -> Chart | None:
    """Return the overlap of routings with the first run, a bar per run and shared layer; layers are shared from the last one."""
    known = [(number, run, run.specialisation) for number, run in enumerate(runs) if run.specialisation is not None]
    if len(known) < 2:
        return None
    _, first, reference = known[0]
    figure = panel_grid([""], 1, 230)
    for number, run, compared in known[1:]:
        if (reference.domains, reference.classes) != (compared.domains, compared.classes):
            continue
        names: list[str] = []
        values: list[float] = []
        for back in range(1, min(len(reference.experts), len(compared.experts)) + 1):
            mine, theirs = len(reference.experts) - back, len(compared.experts) - back
            if reference.experts[mine] == compared.experts[theirs]:
                names.insert(0, run.layer(theirs))
                values.insert(0, round(overlap(reference.by_cell(mine), compared.by_cell(theirs)), 4))
        if values:
            figure.add_bar(x=names, y=values, name=run.name, marker_color=run_colour(number), hovertemplate="%{y:.3f}")
    if not figure.data:
        return None
    figure.update_yaxes(title="share", range=[0, 1])
    text = (
        f"Share of assignments that go to the same experts as in {first.name}, by domain and class of token; layers are "
        "compared from the last one backwards. Experts of two runs correspond only if one started from the other's weights."
    )
    return Chart("overlap", f"Routings alike to {first.name}", text, figure)


def preferences(number: int, run: Run) -> Chart | None:
    """Return the heat maps of groups and experts of one run, a row of panels per layer."""
    found = run.specialisation
    if found is None:
        return None
    titles = [
        f"{run.layer(layer)}: {kind}" for layer in range(len(found.experts)) for kind in ("domain", "class of token")
    ]
    groups = max(len(found.domains), _classes_seen(found))
    figure = panel_grid(titles, 2, max(130, 24 * groups), between=0.15)
    for layer in range(len(found.experts)):
        halves = ((found.domains, found.by_domain(layer)), (found.classes, found.by_class(layer)))
        for column, (names, counts) in enumerate(halves):
            _add_preferences(figure, names, counts, grid_cell(2 * layer + column, 2), layer == column == 0)
    figure.update_xaxes(showgrid=False, title={"text": "expert", "standoff": 4})
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(plot_bgcolor="#D9DEE4")
    step = "" if found.step is None else f" after {found.step:,} steps"
    text = (
        f"Validation text{step}: a group's share of assignments to an expert, relative to the share of all tokens. White is no "
        f"preference, red more (dark red {RATIO_MAX:g} times and above), blue less, black none; grey: an unused expert. "
        "Experts are sorted by the group that prefers them."
    )
    title = f"What experts are used for (times the share of all tokens): {run.name}"
    return Chart(f"preference-{number}", title, text, figure)


def _classes_seen(found: Specialisation) -> int:
    return int((found.counts.sum(axis=(0, 2, 3)) > 0).sum())


def _add_preferences(figure: go.Figure, names: list[str], counts: np.ndarray, where: dict[str, int], bar: bool) -> None:
    seen = counts.sum(axis=1) > 0
    names, counts = [name for name, there in zip(names, seen, strict=True) if there], counts[seen]
    if not names:
        return
    ratio = preference(counts)  # [G, E]
    known = np.nan_to_num(ratio, nan=-1.0)
    order = np.lexsort((-known.max(axis=0), known.argmax(axis=0), np.isnan(ratio).all(axis=0)))  # [E]
    shares = counts / counts.sum(axis=1, keepdims=True)
    figure.add_heatmap(
        **ratio_heat_map(ratio[:, order], bar),
        y=names,
        customdata=[
            [[int(expert), round(float(row[expert]), 4), int(some[expert])] for expert in order]
            for row, some in zip(shares, counts, strict=True)
        ],
        hovertemplate="%{y}, expert %{customdata[0]}: %{z:.2f} times the share of all tokens<br>%{customdata[1]:.1%} of the "
        "group, %{customdata[2]:,} tokens<extra></extra>",
        **where,
    )
    plain = {"tickangle": 0, "tickfont_size": 9 if len(order) > 20 else 11}
    if len(order) <= MAX_NAMED:
        figure.update_xaxes(
            tickvals=list(range(len(order))), ticktext=[str(expert) for expert in order], **plain, **where
        )
    else:
        figure.update_xaxes(showticklabels=False, ticks="", **where)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts that the runs have data for."""
    made = [information(runs), overlaps(runs), *(preferences(number, run) for number, run in enumerate(runs))]
    return [chart for chart in made if chart is not None]
