"""The page of `nlgmoe experts`: a text coloured by expert, and a card for each expert; one HTML file that works offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nlgmoe.eval.trace import Trace
from nlgmoe.files import atomic_write
from nlgmoe.tools.experts.study import ExpertStudy
from nlgmoe.tools.html import html_page

FILE = "experts.html"
SAMPLE = 400  # tokens of each domain in the coloured text
IDS, AROUND = 4, 10  # ids of a card with a context, and tokens on both sides


def write(folder: Path, study: ExpertStudy) -> Path:
    """Write the page into a folder, and return its file."""
    file = folder / FILE
    with atomic_write(file) as temporary:
        temporary.write_text(page(study), encoding="utf-8")
    return file


def page(study: ExpertStudy) -> str:
    """Return the page's HTML."""
    trace, tables, decode = study.trace, study.tables, study.loaded.tokenizer.decode
    facts = {
        "layers": [
            {"block": block, "experts": count}
            for block, count in zip(trace.facts.blocks, trace.facts.experts, strict=True)
        ],
        "domains": trace.facts.domains,
        "cards": _cards(tables, trace, decode),
        "analyses": _records(tables["analyses"]),
        "texts": [_sample(trace, number, name, decode) for number, name in enumerate(trace.facts.domains)],
        "routed_around": any(removal == "route_around" for _, _, removal in study.exact),
    }
    title = f"Experts of {study.loaded.path}"
    about = (
        f"{trace.num_tokens:,} tokens of {', '.join(trace.facts.domains)}, loss {study.causes.loss:.4f} nats per token."
    )
    body = f"""<h1>{escape(title)}</h1>
<p>{escape(about)}</p>
<form id="controls">
<label>MoE layer <select id="layer"></select></label>
<label>order <select id="order"></select></label>
<label>text <select id="domain"></select></label>
<button type="button" id="clear" hidden>show all experts</button>
</form>
<h2>Text by expert</h2>
<p>The colour of a token is that of its first choice. Click a token or a card to see one expert alone.</p>
<div id="text"></div>
<h2>Experts</h2>
<p>Use: share of the tokens that choose the expert; the mark is an equal share. Loss without it: change of the loss in nats per
token of all text if its output were 0, to first order (exact where computed), with 95% intervals. Tokens: those that tell most
about the choice, with the share of them that choose the expert.</p>
<div id="cards"></div>
<h2>Analyses</h2>
<p>Means of the largest shares; shuffled: the same choices at random tokens. A value near its shuffled one shows nothing.</p>
<div id="analyses"></div>"""
    return html_page(title, "nlgmoe.tools.experts", body, facts)


def _cards(
    tables: Mapping[str, pd.DataFrame], trace: Trace, decode: Callable[[Sequence[int]], str]
) -> list[list[dict[str, Any]]]:
    """Return the cards of each layer."""
    none = pd.DataFrame(columns=["layer", "expert", "of", "other", "share"])
    vocabulary, pairs = tables.get("vocabulary", none), tables.get("coactivation", none)
    tokens, documents, layers = trace.read("tokens"), trace.read("document"), []
    for layer in range(len(trace.facts.blocks)):
        chosen = trace.experts_of(layer)
        words = dict(list(vocabulary[vocabulary["layer"] == layer].groupby("expert")))
        others = dict(list(pairs[pairs["layer"] == layer].groupby("expert")))
        cards = _records(tables["experts"][tables["experts"]["layer"] == layer])
        for card in cards:
            expert = int(card["expert"])
            of_expert = words.get(expert, none)
            for kind in ("input", "next"):
                card[kind] = _records(of_expert[of_expert["of"] == kind])
            ids = [int(word["id"]) for word in card["input"][:IDS]]
            card["contexts"] = [
                context for token in ids if (context := _context(token, expert, tokens, documents, chosen, decode))
            ]
            together = others.get(expert, none).sort_values("share", ascending=False)
            card["together"] = _records(together.head(3)[["other", "share"]])
        layers.append(cards)
    return layers


def _context(
    token: int,
    expert: int,
    tokens: np.ndarray,
    documents: np.ndarray,
    chosen: np.ndarray,
    decode: Callable[[Sequence[int]], str],
) -> list[str]:
    """Return the text before, at and after the first token of an id that chose the expert."""
    places = np.flatnonzero(tokens == token)
    places = places[(chosen[places] == expert).any(axis=1)]
    if not len(places):
        return []
    place = int(places[0])
    first, last = max(0, place - AROUND), place + AROUND + 1
    same = documents[first:last] == documents[place]
    around = tokens[first:last]
    here = place - first
    before = around[:here][same[:here]]
    return [decode(before.tolist()), decode([token]), decode(around[here + 1 :][same[here + 1 :]].tolist())]


def _sample(trace: Trace, domain: int, name: str, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Return the first tokens of a domain and their choices, `[L, n, k]`."""
    rows = np.flatnonzero(trace.read("domain") == domain)[:SAMPLE]
    if not len(rows):
        return {"domain": name, "tokens": [], "experts": []}
    around = slice(int(rows[0]), int(rows[-1]) + 1)
    tokens, experts = (trace.read(column, around)[rows - rows[0]] for column in ("tokens", "experts"))
    texts = [decode([token]) for token in tokens.tolist()]
    return {"domain": name, "tokens": texts, "experts": experts.transpose(1, 0, 2).tolist()}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows with numbers rounded to five digits; None for NaN."""
    rows: list[dict[str, Any]] = frame.to_dict("records")
    return [{name: _rounded(value) for name, value in row.items()} for row in rows]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value
