"""What the experts of a model are used for: how often tokens of each domain and class ask for each expert.

Letters: D domains, C token classes, L MoE layers, E experts of the largest layer, G groups (domains or classes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from nlgmoe.files import atomic_write, require_regular

FILE = "specialisation.safetensors"  # in the run folder


@dataclass(frozen=True)
class Specialisation:
    """Assignments of evaluated tokens, before dropping; padding left out. A token belongs to the class of what is read there.

    Attributes:
        counts: `[D, C, L, E]` int64; 0 where a layer has fewer experts.
        domains: names.
        classes: names (`token_classes.py`); one for all tokens where the tokenizer is not known.
        experts: of each MoE layer.
        step: of the optimizer, when this was counted; None: not in a run.
    """

    counts: np.ndarray
    domains: list[str]
    classes: list[str]
    experts: list[int]
    step: int | None = None

    def by_domain(self, layer: int) -> np.ndarray:
        """`[D, E of the layer]` assignments."""
        found: np.ndarray = self.counts[:, :, layer, : self.experts[layer]].sum(axis=1)
        return found

    def by_class(self, layer: int) -> np.ndarray:
        """`[C, E of the layer]` assignments."""
        found: np.ndarray = self.counts[:, :, layer, : self.experts[layer]].sum(axis=0)
        return found

    def save(self, folder: str | Path) -> Path:
        """Write `specialisation.safetensors`, whole or not at all; its path."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {name: getattr(self, name) for name in ("domains", "classes", "experts", "step")}
        with atomic_write(path) as temporary:
            temporary.write_bytes(save({"counts": np.ascontiguousarray(self.counts)}, {"facts": json.dumps(facts)}))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Specialisation:
        """Undo `save`.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        require_regular(path, "validate the run again")
        try:
            with safe_open(path, "numpy") as file:
                facts, counts = json.loads(file.metadata()["facts"]), file.get_tensor("counts")
            return cls(counts, **facts)
        except Exception as error:  # safetensors raises a class of its own
            raise ValueError(f"{path} is damaged ({error}); validate the run again") from error


def preference(counts: np.ndarray) -> np.ndarray:
    """How many times as often as all tokens together a group asks for an expert, `[G, E]`; 1: no preference.

    Args:
        counts: `[G, E]` assignments. NaN for a group without tokens, and for an expert that nobody asks for.
    """
    total = counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = counts * total / (counts.sum(axis=1, keepdims=True) * counts.sum(axis=0, keepdims=True))
    return ratio


def information(counts: np.ndarray) -> float:
    """Bits that an assignment's expert tells about its group: their mutual information; 0 for experts without preferences.

    Args:
        counts: `[G, E]` assignments.
    """
    ratio = preference(counts)
    used = counts > 0
    return float((counts[used] / counts.sum() * np.log2(ratio[used])).sum()) if used.any() else 0.0


def entropy(counts: np.ndarray) -> float:
    """Bits that there are to know about an assignment's group, the most that `information` can be.

    Args:
        counts: `[G, E]` assignments.
    """
    groups = counts.sum(axis=1)
    shares = groups[groups > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum())
