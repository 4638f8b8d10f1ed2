"""Expert specialisation: assignments to each expert by domain and token class.

Letters: D domains, C token classes, L MoE layers, E experts of the largest layer, G groups (domains or classes).
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from nlgmoe.files import atomic_write
from nlgmoe.validation import RunError

FILE = "specialisation.safetensors"  # in the run folder
CLASSES = (  # of tokens
    "word start",  # a letter after whitespace: " the"
    "word part",  # a letter without preceding whitespace: "ing"; also a word at the beginning of a line
    "number",
    "punctuation",  # of prose
    "code symbol",  # such as { = _ <
    "whitespace",  # only
    "end of document",  # no bytes
    "other",  # non-ASCII symbols, control characters, parts of a character
)
PROSE = frozenset(".,;:!?'\"()-")


def token_class(spelling: bytes) -> str:
    """Return the class, one of `CLASSES`, of a token's bytes; the first character that is not whitespace decides."""
    if not spelling:
        return "end of document"
    try:
        text = spelling.decode()
    except UnicodeDecodeError:
        return "other"
    stripped = text.lstrip()
    if not stripped:
        return "whitespace"
    first = stripped[0]
    if first.isalpha():
        return "word start" if text[0].isspace() else "word part"
    if first.isnumeric():
        return "number"
    if first.isascii() and first.isprintable():
        return "punctuation" if first in PROSE else "code symbol"
    return "punctuation" if unicodedata.category(first).startswith("P") else "other"


@dataclass(frozen=True)
class Specialisation:
    """Assignments of evaluated tokens before dropping, without padding. The input token decides the class.

    Attributes:
        counts: `[D, C, L, E]` int64; 0 beyond a layer's number of experts.
        domains: names.
        classes: names, `CLASSES`; a single class if the tokenizer is unknown.
        experts: number of experts of each MoE layer.
        step: optimizer steps taken when the assignments were counted; None: outside a run.
    """

    counts: np.ndarray
    domains: list[str]
    classes: list[str]
    experts: list[int]
    step: int | None = None

    def by_domain(self, layer: int) -> np.ndarray:
        """Return assignments `[D, E of the layer]`."""
        assignments: np.ndarray = self.counts[:, :, layer, : self.experts[layer]].sum(axis=1)
        return assignments

    def by_class(self, layer: int) -> np.ndarray:
        """Return assignments `[C, E of the layer]`."""
        assignments: np.ndarray = self.counts[:, :, layer, : self.experts[layer]].sum(axis=0)
        return assignments

    def by_cell(self, layer: int) -> np.ndarray:
        """Return assignments of each domain and class `[D * C, E of the layer]`."""
        cells: np.ndarray = self.counts[:, :, layer, : self.experts[layer]].reshape(-1, self.experts[layer])
        return cells

    def save(self, folder: str | Path) -> Path:
        """Write `specialisation.safetensors` atomically and return its path."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {name: getattr(self, name) for name in ("domains", "classes", "experts", "step")}
        with atomic_write(path) as temporary:
            temporary.write_bytes(save({"counts": np.ascontiguousarray(self.counts)}, {"facts": json.dumps(facts)}))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Specialisation:
        """Read the file that `save` wrote.

        Raises:
            OSError: the file does not exist.
            ValueError: the file is damaged.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        try:
            with safe_open(path, "numpy") as file:
                facts, counts = json.loads(file.metadata()["facts"]), file.get_tensor("counts")
            return cls(counts, **facts)
        except Exception as error:  # safetensors' own exception class among them
            raise RunError(f"{path} is damaged ({error}); validate the run again") from error


def preference(counts: np.ndarray) -> np.ndarray:
    """Return a group's share of assignments to each expert over the share of all tokens, `[G, E]`; 1: no preference.

    Groups without tokens and experts without assignments are NaN.

    Args:
        counts: `[G, E]` assignments.
    """
    total = counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = counts * total / (counts.sum(axis=1, keepdims=True) * counts.sum(axis=0, keepdims=True))
    return ratio


def mutual_information(counts: np.ndarray) -> float:
    """Return the mutual information, in bits, of an assignment's expert and group; 0: experts have no preferences.

    Args:
        counts: `[G, E]` assignments.
    """
    ratio = preference(counts)
    used = counts > 0
    return float((counts[used] / counts.sum() * np.log2(ratio[used])).sum()) if used.any() else 0.0


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the share of assignments that two models give to the same experts: 1 if every group is routed alike.

    The mean over groups, weighted by the first model's assignments, of `sum_e min(p_1(e | group), p_2(e | group))`.

    Args:
        first: `[G, E]` assignments of a model.
        second: `[G, E]` assignments of another one, on the same text.
    """
    seen = (first.sum(axis=1) > 0) & (second.sum(axis=1) > 0)
    first, second = first[seen], second[seen]
    if not len(first):
        return 0.0
    shares = [counts / counts.sum(axis=1, keepdims=True) for counts in (first, second)]
    return float((np.minimum(*shares).sum(axis=1) * first.sum(axis=1)).sum() / first.sum())


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of an assignment's group in bits: the upper bound of `mutual_information`.

    Args:
        counts: `[G, E]` assignments.
    """
    groups = counts.sum(axis=1)
    shares = groups[groups > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum())
