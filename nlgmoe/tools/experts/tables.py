"""The tables of `nlgmoe experts`, as data frames: a row for each expert, for each analysis, for each pair, for each id.

    frames["experts"]        layer, block, expert, use, use/DOMAIN, first_order and its half-widths, by domain, contribution, ...
    frames["analyses"]       layer, analysis, value, shuffled, uniform
    frames["coactivation"]   layer, expert, other, share, shuffled, uniform             k > 1
    frames["vocabulary"]     layer, expert, of, id, text, tokens, share, shuffled, uniform, information

Changes of the loss are in nats per token of all text, or of the domain that a column names; `_half` is the half-width of
their 95% interval (`eval/causes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric.utilities import move_data_to_device
from tqdm import tqdm

from nlgmoe.batch import Batch, loss_mask, token_mask_or_none
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import hash_of_weights
from nlgmoe.eval.causes import CHUNK, Changes, FirstOrder, exact_changes, first_order
from nlgmoe.eval.interventions import Experts, Removal
from nlgmoe.eval.loaded_model import LoadedModel
from nlgmoe.eval.perplexity import batch_losses
from nlgmoe.eval.trace import Layout, Trace, TraceFacts, TraceWriter
from nlgmoe.eval.trace_analyses import FREQUENT, LayerAnalysis, Summary, analyse
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import moe_blocks
from nlgmoe.tools.measured_text import MeasuredText
from nlgmoe.validation import require

TRACE = "routing.safetensors"
LISTED = 12  # ids of an expert in the table of vocabulary
DISAGREE = 0.5  # rank correlation of both halves of the text below which a note says so
REMOVALS: tuple[Removal, ...] = ("contribution", "route_around")


@dataclass(frozen=True)
class Found:
    """What a text says about a model's experts; `causes` None: the trace alone."""

    trace: Trace
    causes: FirstOrder | None = None
    exact: dict[tuple[int, int, Removal], Changes] = field(default_factory=dict)


def read(
    loaded: LoadedModel,
    measured: MeasuredText,
    path: Path,
    causes: bool = True,
    weights: bool = False,
    layout: Layout = "nlgmoe",
) -> Found:
    """Read the text once: record its trace, and with `causes` measure first-order changes."""
    blocks = moe_blocks(loaded.model.config)
    require(bool(blocks), f"{loaded.path} has no experts: it is a dense model")
    facts = TraceFacts(
        list(blocks),
        list(blocks.values()),
        loaded.model.config.num_layers,
        measured.domains,
        hash_of_weights(Checkpoint(loaded.path)),
        loaded.document.get("global_step"),
        layout,
    )
    with TraceWriter(path, facts, loaded.tokenizer.eod_id, weights) as writer:
        if causes:
            changes = first_order(loaded.model, _shown(measured.batches, "routing, forwards and backwards"), writer.add)
        else:
            _forward(loaded.model, _shown(measured.batches, "routing"), writer)
    return Found(Trace(path), changes if causes else None)


@torch.no_grad()
def _forward(model: GPT, batches: Iterable[Batch], writer: TraceWriter) -> None:
    for batch in (move_data_to_device(batch, model.unembedding.device) for batch in batches):
        output = model(batch["tokens"], token_mask_or_none(batch), documents=batch.get("document"))
        writer.add(batch, output.routings)


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Batch]) -> float:
    """Return the mean loss of a text, nats per token."""
    total, tokens = 0.0, 0
    for batch in (move_data_to_device(batch, model.unembedding.device) for batch in batches):
        losses, _ = batch_losses(model, batch, CHUNK)
        counted = loss_mask(batch)
        total += float(losses[counted].sum(dtype=torch.float64))
        tokens += int(counted.sum())
    return total / max(1, tokens)


def _shown(batches: Any, name: str) -> Any:
    return tqdm(batches, name, mininterval=1)


def with_exact(model: GPT, measured: MeasuredText, found: Found, chosen: Experts) -> Found:
    """Add the exact changes of chosen experts; one pass for each and for each of `REMOVALS`."""
    if not chosen:
        return found
    number = sum(map(len, chosen.values()))
    exact = exact_changes(model, _shown(measured.batches, f"removing {number} experts, one by one"), chosen, REMOVALS)
    return Found(found.trace, found.causes, exact)


def all_tables(
    loaded: LoadedModel, found: Found, saturated: Sequence[Summary] | None = None
) -> dict[str, pd.DataFrame]:
    """Return the tables by name; the page and the CSV files have the same numbers."""
    facts = found.trace.facts
    rows: dict[str, list[dict[str, Any]]] = {"experts": [], "analyses": [], "coactivation": [], "vocabulary": []}
    for layer in tqdm(range(len(facts.blocks)), "analysing layers", mininterval=1):
        analysis = analyse(found.trace, layer)
        where = {"layer": layer, "block": facts.blocks[layer]}
        rows["experts"] += [where | row for row in _experts(analysis, found, layer)]
        rows["analyses"] += [where | _summary(summary) for summary in analysis.summaries()]
        if saturated is not None:
            rows["analyses"].append(where | _summary(saturated[layer]) | {"analysis": "saturation"})
        rows["coactivation"] += [where | row for row in _pairs(analysis)]
        rows["vocabulary"] += [where | row for row in _vocabulary(analysis, loaded.tokenizer.decode)]
    return {name: pd.DataFrame(content) for name, content in rows.items() if content}


def _summary(summary: Summary) -> dict[str, Any]:
    return {name: getattr(summary, name) for name in ("analysis", "value", "shuffled", "uniform")}


def _experts(analysis: LayerAnalysis, found: Found, layer: int) -> Iterator[dict[str, Any]]:
    first = None if found.causes is None else found.causes.layers[layer]
    equal = np.full_like(analysis.use, analysis.top_k / analysis.num_experts)
    whole: dict[str, np.ndarray] = {"use": analysis.use, "use_uniform": equal}
    for number, name in enumerate(analysis.domains):
        whole[f"use/{name}"] = analysis.by_domain[number]
        whole[f"use_shuffled/{name}"] = analysis.shuffled.by_domain[number]
    if first is not None:
        whole |= dict(_with_intervals("first_order", first, analysis.domains))
    exact = {(expert, removal): change for (of, expert, removal), change in found.exact.items() if of == layer}
    for expert in range(analysis.num_experts):
        row: dict[str, Any] = {"expert": expert} | {name: float(values[expert]) for name, values in whole.items()}
        for removal in REMOVALS:
            if (expert, removal) in exact:
                for name, value in _with_intervals(removal, exact[expert, removal], analysis.domains):
                    row[name] = float(value)
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


def describe(found: Found, frames: Mapping[str, pd.DataFrame]) -> str:
    """Return the analyses, and the experts that the text needs most and least, for a terminal."""
    lines = [frames["analyses"].round(3).to_string(index=False)]
    if found.causes is None:
        return lines[0]
    lines.append(f"loss {found.causes.loss:.4f} nats per token ({found.causes.tokens:,} tokens)")
    experts = frames["experts"]
    for layer, rows in experts.groupby("layer"):
        ordered = rows.sort_values("first_order", ascending=False)
        most, least = (
            " ".join(_named(row) for row in part.itertuples()) for part in (ordered.head(4), ordered.tail(4))
        )
        lines.append(f"MoE layer {layer}: without it, to first order, most is lost with {most}; least with {least}")
        if (agreement := found.causes.layers[int(str(layer))].agreement()) < DISAGREE:
            lines.append(
                f"MoE layer {layer}: the halves of the text disagree on the order of experts (rank correlation {agreement:.2f}): "
                "read more text, with --windows"
            )
    return "\n".join(lines)


def _named(row: Any) -> str:
    return f"{row.expert} ({row.first_order:+.4f} ± {row.first_order_half:.4f})"
