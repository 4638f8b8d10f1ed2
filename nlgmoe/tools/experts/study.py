"""The study of a model's experts on a text, as data frames: a row for each expert, analysis, pair of experts, and id.

    experts        layer, block, expert, use, use/DOMAIN, first_order, first_order_half, first_order/DOMAIN, contribution, ...
    analyses       layer, block, analysis, value, shuffled, uniform
    coactivation   layer, block, expert, other, share, shuffled, uniform                    k > 1
    vocabulary     layer, block, expert, of, id, text, tokens, share, shuffled, uniform, information

Changes of the loss are in nats per token of all text, or of the domain that a column names; `_half` is the half-width of
their 95% interval (`eval/causes.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric.utilities import move_data_to_device
from tqdm import tqdm

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import hash_of_weights
from nlgmoe.eval.causes import Changes, FirstOrder, exact_changes, first_order
from nlgmoe.eval.interventions import Experts, Removal, remove_experts
from nlgmoe.eval.loaded_model import LoadedModel
from nlgmoe.eval.perplexity import read_batch
from nlgmoe.eval.trace import Trace, TraceFacts, TraceWriter
from nlgmoe.eval.trace_analyses import FREQUENT, LayerAnalysis, Summary, analyse, saturation
from nlgmoe.pyramid import moe_blocks
from nlgmoe.tools.measured_text import MeasuredText
from nlgmoe.validation import require

TRACE = "routing.safetensors"
LISTED = 12  # ids of an expert in the table of vocabulary
SHOWN = 3  # experts at both ends of the order, for a terminal
DISAGREE = 0.5  # rank correlation of both halves of the text below which a note says so
REMOVALS: tuple[Removal, ...] = ("contribution", "route_around")


@dataclass(frozen=True)
class ExpertStudy:
    """What a text says about a model's experts.

    Attributes:
        loaded: the model.
        trace: the choices of every token.
        causes: first-order changes of every expert.
        exact: changes of (MoE layer, expert, removal).
        tables: by name, as above.
    """

    loaded: LoadedModel
    trace: Trace
    causes: FirstOrder
    exact: dict[tuple[int, int, Removal], Changes]
    tables: dict[str, pd.DataFrame]


def study_experts(
    loaded: LoadedModel,
    measured: MeasuredText,
    folder: str | Path,
    exact: Experts = MappingProxyType({}),
    against: LoadedModel | None = None,
    weights: bool = False,
    removals: Sequence[Removal] = REMOVALS,
) -> ExpertStudy:
    """Read a text forwards and backwards, and count and measure what each expert does.

        loaded = load_pretrained("runs/quickstart")
        text = measured_text(Path("runs/quickstart/config.yaml"), loaded, windows=100)
        study = study_experts(loaded, text, "experts", exact={0: [3]})
        study.tables["experts"]

    Args:
        folder: gets the trace, routing.safetensors.
        exact: experts of MoE layers whose changes are computed exactly too, one pass for each and for each removal.
        against: an earlier checkpoint of the same run, for the analysis of saturation.
        weights: store the experts' weights in the trace too.
        removals: of `exact`; a router that cannot route around experts has `contribution` only.
    """
    if against is not None:
        is_same = against.path.resolve() == loaded.path.resolve()
        require(not is_same, f"against={against.path} is the checkpoint itself; give an earlier one, step-N.ckpt")
        same_ids = against.tokenizer.has_same_ids(loaded.tokenizer)
        require(same_ids, f"against={against.path} has another tokenizer than {loaded.path}; give one of the same run")
    path, model = Path(folder) / TRACE, loaded.model
    for layer, numbers in exact.items():
        for removal in removals:  # a router refuses before the text is read
            for expert in numbers:
                remove_experts(model, {layer: [expert]}, removal).close()
    with TraceWriter(path, _facts(loaded, measured.domains), loaded.tokenizer.eod_id, weights) as writer:
        causes = first_order(model, _shown(measured.batches, "reading forwards and backwards"), writer.add)
    trace, saturated, changes = Trace(path), None, {}
    if against is not None:
        with tempfile.TemporaryDirectory() as temporary:
            saturated = saturation(record(against, measured, Path(temporary) / TRACE), trace)
    if exact:
        number = sum(map(len, exact.values()))
        changes = exact_changes(model, _shown(measured.batches, f"removing {number} experts in turn"), exact, removals)
    tables = _tables(trace, causes, changes, saturated, loaded.tokenizer.decode)
    return ExpertStudy(loaded, trace, causes, changes, tables)


@torch.no_grad()
def record(loaded: LoadedModel, measured: MeasuredText, path: Path, weights: bool = False) -> Trace:
    """Record the trace of a text, without a backward pass."""
    model, facts = loaded.model, _facts(loaded, measured.domains)
    with TraceWriter(path, facts, loaded.tokenizer.eod_id, weights) as writer:
        for batch in _shown(measured.batches, "routing"):
            moved = move_data_to_device(batch, model.unembedding.device)
            writer.add(batch, read_batch(model, moved).routings)
    return Trace(path)


def _facts(loaded: LoadedModel, domains: list[str]) -> TraceFacts:
    config, step = loaded.model.config, loaded.document.get("global_step")
    require(bool(moe_blocks(config)), f"{loaded.path} has no experts: it is a dense model")
    weights_hash = hash_of_weights(Checkpoint(loaded.path))
    return TraceFacts.of(config, domains, weights_hash=weights_hash, step=step)


def _shown(batches: Any, name: str) -> Any:
    return tqdm(batches, name, mininterval=1)


def _tables(
    trace: Trace,
    causes: FirstOrder,
    exact: Mapping[tuple[int, int, Removal], Changes],
    saturated: Sequence[Summary] | None,
    decode: Callable[[list[int]], str],
) -> dict[str, pd.DataFrame]:
    rows: dict[str, list[dict[str, Any]]] = {"experts": [], "analyses": [], "coactivation": [], "vocabulary": []}
    for layer, block in enumerate(trace.facts.blocks):
        analysis, where = analyse(trace, layer), {"layer": layer, "block": block}
        of_layer = {(expert, removal): change for (of, expert, removal), change in exact.items() if of == layer}
        rows["experts"] += [where | row for row in _experts(analysis, causes.layers[layer], of_layer)]
        rows["analyses"] += [where | _summary(summary) for summary in analysis.summaries()]
        if saturated is not None:
            rows["analyses"].append(where | _summary(saturated[layer]))
        rows["coactivation"] += [where | row for row in _pairs(analysis)]
        rows["vocabulary"] += [where | row for row in _vocabulary(analysis, decode)]
    return {name: pd.DataFrame(content) for name, content in rows.items() if content}


def _summary(summary: Summary) -> dict[str, Any]:
    return {name: getattr(summary, name) for name in ("analysis", "value", "shuffled", "uniform")}


def _experts(
    analysis: LayerAnalysis, first: Changes, exact: Mapping[tuple[int, Removal], Changes]
) -> Iterator[dict[str, Any]]:
    equal = np.full_like(analysis.use, analysis.top_k / analysis.num_experts)
    columns: dict[str, np.ndarray] = {"use": analysis.use, "use_uniform": equal}
    for number, name in enumerate(analysis.domains):
        columns[f"use/{name}"] = analysis.by_domain[number]
        columns[f"use_shuffled/{name}"] = analysis.shuffled.by_domain[number]
    columns |= dict(_with_intervals("first_order", first, analysis.domains))
    for expert in range(analysis.num_experts):
        row: dict[str, Any] = {"expert": expert} | {name: float(values[expert]) for name, values in columns.items()}
        for removal in REMOVALS:
            if (expert, removal) in exact:
                of_expert = _with_intervals(removal, exact[expert, removal], analysis.domains)
                row |= {name: float(value) for name, value in of_expert}
        yield row


def _with_intervals(name: str, changes: Changes, domains: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    yield name, changes.mean()
    yield f"{name}_half", changes.half_width()
    if len(domains) > 1:
        for number, domain in enumerate(domains):
            of_domain = changes.domain == number
            yield f"{name}/{domain}", changes.mean(of_domain)
            yield f"{name}_half/{domain}", changes.half_width(of_domain)


def _pairs(analysis: LayerAnalysis) -> Iterator[dict[str, Any]]:
    if analysis.top_k == 1:
        return
    measured, shuffled = analysis.pairs, analysis.shuffled.pairs
    uniform = (analysis.top_k - 1) / max(1, analysis.num_experts - 1)
    for expert, other in zip(*np.nonzero(~np.isnan(measured)), strict=True):
        shares = {"share": measured[expert, other], "shuffled": shuffled[expert, other], "uniform": uniform}
        yield {"expert": int(expert), "other": int(other), **shares}


def _vocabulary(analysis: LayerAnalysis, decode: Any) -> Iterator[dict[str, Any]]:
    """Yield each expert's ids of most information: N * share * log2(share / use), of ids of at least `FREQUENT` tokens."""
    for of in ("tokens", "next_tokens"):
        (shares, tokens), (control, _) = analysis.vocabulary(of), analysis.shuffled.vocabulary(of)
        frequent = np.nonzero(tokens >= FREQUENT)[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.log2(shares[frequent] / analysis.use)  # [V', E]
            information = np.nan_to_num(tokens[frequent, None] * shares[frequent] * gain, neginf=0, posinf=0)
        for expert in range(analysis.num_experts):
            best = np.argsort(-information[:, expert], kind="stable")[:LISTED]
            for place in best[information[best, expert] > 0]:
                token = int(frequent[place])
                yield {
                    "expert": expert,
                    "of": "input" if of == "tokens" else "next",
                    "id": token,
                    "text": decode([token]),
                    "tokens": int(tokens[token]),
                    "share": float(shares[token, expert]),
                    "shuffled": float(control[token, expert]),
                    "uniform": analysis.top_k / analysis.num_experts,
                    "information": float(information[place, expert]),
                }


def describe(study: ExpertStudy) -> str:
    """Return the analyses, and the experts that are used most, and that change the loss most and least, for a terminal."""
    causes, lines = study.causes, [study.tables["analyses"].round(3).to_string(index=False)]
    lines.append(f"loss {causes.loss:.4f} nats per token ({causes.tokens:,} tokens)")
    lines.append("change of the loss without an expert, to first order, with 95% intervals:")
    for layer, changes in enumerate(causes.layers):
        experts = study.tables["experts"]
        rows = experts[experts["layer"] == layer].sort_values("first_order", ascending=False)
        shown = min(SHOWN, len(rows) // 2)
        used = ", ".join(f"{row.expert} ({row.use:.1%})" for row in rows.nlargest(shown, "use").itertuples())
        largest, smallest = (
            ", ".join(f"{row.expert} {_change(row, 'first_order')}" for row in part.itertuples())
            for part in (rows.head(shown), rows.tail(shown))
        )
        lines.append(f"MoE layer {layer}: most used {used}; largest change {largest}; smallest {smallest}")
        if (agreement := changes.agreement()) < DISAGREE:
            reason = f"the halves of the text disagree on the order of experts (rank correlation {agreement:.2f})"
            lines.append(f"MoE layer {layer}: {reason}; read more text, with --windows")
        for row in rows.itertuples():
            removals = [removal for removal in REMOVALS if (layer, row.expert, removal) in study.exact]
            if exact := ", ".join(f"{removal} {_change(row, removal)}" for removal in removals):
                lines.append(f"MoE layer {layer}, without expert {row.expert}: {exact}")
    return "\n".join(lines)


def _change(row: Any, name: str) -> str:
    return f"{getattr(row, name):+.5f} ± {getattr(row, f'{name}_half'):.5f}"
