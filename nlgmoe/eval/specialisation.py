"""Expert specialisation: assignments to each expert by domain and token class, summed over ranks.

Letters: D domains, C token classes, L MoE layers, E experts of the largest layer, G groups (domains or classes).
`counts` of functions are assignments, `[G, E]`.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor
from torchmetrics import Metric

from nlgmoe.batch import Batch
from nlgmoe.eval.perplexity import read_batch
from nlgmoe.files import atomic_write
from nlgmoe.layers.routing import Routing, count
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import moe_blocks
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
        return self._of(layer).sum(axis=1)

    def by_class(self, layer: int) -> np.ndarray:
        """Return assignments `[C, E of the layer]`."""
        return self._of(layer).sum(axis=0)

    def _of(self, layer: int) -> Any:
        return self.counts[:, :, layer, : self.experts[layer]]  # [D, C, E of the layer]

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
        """Read the file that `save` wrote."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, "numpy") as file:
                facts, counts = json.loads(file.metadata()["facts"]), file.get_tensor("counts")
            return cls(counts, **facts)
        except FileNotFoundError:
            raise
        except Exception as error:  # safetensors' own exception class among them
            raise RunError(f"{path} is damaged ({error}); validate the run again") from error


def preference(counts: np.ndarray) -> np.ndarray:
    """Return a group's share of assignments to each expert over the share of all tokens, `[G, E]`; 1: no preference.

    Groups without tokens and experts without assignments are NaN.
    """
    total = counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = counts * total / (counts.sum(axis=1, keepdims=True) * counts.sum(axis=0, keepdims=True))
    return ratio


def mutual_information(counts: np.ndarray) -> float:
    """Return the mutual information, in bits, of an assignment's expert and group; 0: experts have no preferences."""
    ratio = preference(counts)
    used = counts > 0
    return float((counts[used] / counts.sum() * np.log2(ratio[used])).sum()) if used.any() else 0.0


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of an assignment's group in bits: the upper bound of `mutual_information`."""
    groups = counts.sum(axis=1)
    shares = groups[groups > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum())


class ExpertCounts(Metric):
    """Counts assignments to each expert by domain and token class.

    Each update is one `scatter_add` per layer on the device; the host reads nothing before `compute`. `experts` are those of
    each MoE layer; see `count_experts` for other arguments.
    """

    counts: Tensor
    classes: Tensor | None

    def __init__(self, experts: Sequence[int], domains: Sequence[str], spellings: Sequence[bytes] | None) -> None:
        super().__init__()
        self.experts, self.domains = list(experts), list(domains)
        self.class_names = list(CLASSES) if spellings is not None else ["all"]
        ids = None if spellings is None else torch.tensor([CLASSES.index(token_class(text)) for text in spellings])
        self.register_buffer("classes", ids, persistent=False)
        groups = len(self.domains) * len(self.class_names)
        zeros = torch.zeros(len(self.experts), groups, max(self.experts), dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, tokens: Tensor, domain: Tensor, routings: Sequence[Routing]) -> None:
        """Add a batch: input ids `[B, T]`, ids of domains `[B]`, and the routing of each MoE layer."""
        domain = domain if len(self.domains) > 1 else torch.zeros_like(domain)  # data without names have one domain
        group = domain.unsqueeze(1).expand_as(tokens) * len(self.class_names)  # [B, T]
        if self.classes is not None:
            group = group + self.classes[tokens]
        _, groups, width = self.counts.shape
        for layer, routing in enumerate(routings):
            cell = group.reshape(-1, 1) * width + routing.expert  # [N, k]
            if routing.token_mask is not None:
                cell = torch.where(routing.token_mask.unsqueeze(1), cell, groups * width)  # padding
            self.counts[layer] += count(cell, groups * width + 1)[:-1].view(groups, width)

    def compute(self) -> Tensor:
        """Return counts `[D, C, L, E]` summed over ranks."""
        by_layer = self.counts.unflatten(1, (len(self.domains), len(self.class_names)))  # [L, D, C, E]
        return by_layer.permute(1, 2, 0, 3)

    def specialisation(self, step: int | None = None) -> Specialisation:
        """Return the counts of all ranks; a collective call."""
        counts = self.compute().cpu().numpy()
        return Specialisation(counts, self.domains, self.class_names, self.experts, step)


def experts_to_evaluate(model: GPT) -> list[int]:
    """Return the number of experts of each MoE layer of a mixture in evaluation mode.

    Raises:
        ValueError: the model is dense, or in training mode.
    """
    if not (experts := list(moe_blocks(model.config).values())):
        raise RunError("the model has no experts: it is dense")
    if model.training:
        raise RunError("the model is in training mode; call model.eval() first")
    return experts


@torch.no_grad()
def count_experts(
    model: GPT, batches: Iterable[Batch], domains: Sequence[str], spellings: Sequence[bytes] | None = None
) -> Specialisation:
    """Count expert assignments by domain and token class over batches of text.

        loaded = load_pretrained("runs/quickstart")
        data.setup()  # a PileDataModule
        specialisation = count_experts(loaded.model, data.val_dataloader(), data.domains, data.tokenizer.spellings)

    Args:
        model: with MoE layers, in evaluation mode.
        domains: names, indexed by a batch's domain ids.
        spellings: `[V]` bytes of each token id; None: all tokens form one class.
    """
    experts = experts_to_evaluate(model)
    device = model.unembedding.device
    counts = ExpertCounts(experts, domains, spellings).to(device)
    for batch in (move_data_to_device(batch, device) for batch in batches):
        counts.update(batch["tokens"], batch["domain"], read_batch(model, batch).routings)
    return counts.specialisation()
