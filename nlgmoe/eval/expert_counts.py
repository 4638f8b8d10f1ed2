"""Counts of expert assignments by domain and token class, summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from nlgmoe.batch import Batch, token_mask_or_none
from nlgmoe.eval.specialisation import CLASSES, Specialisation, token_class
from nlgmoe.layers.counts import count
from nlgmoe.layers.router import Routing
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import moe_blocks
from nlgmoe.validation import RunError


class ExpertCounts(Metric):
    """Counts assignments to each expert by domain and token class.

    Each update is one `scatter_add` per layer on the device; the host reads nothing before `compute`.

    Args:
        experts: number of experts of each MoE layer.
        domains: names, indexed by a batch's domain ids.
        spellings: `[V]` bytes of each token id; None: all tokens form one class.
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
        """Add a batch.

        Args:
            tokens: `[B, T]` input ids.
            domain: `[B]` domain ids.
            routings: one for each MoE layer.
        """
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
        batches: batches of a data module.
        domains: names, indexed by a batch's domain ids.
        spellings: `[V]` bytes of each token id; None: all tokens form one class.

    Raises:
        ValueError: the model is dense, or in training mode.
    """
    experts = list(moe_blocks(model.config).values())
    if not experts:
        raise RunError("the model has no experts: it is dense")
    if model.training:
        raise RunError("the model is in training mode; call model.eval() first")
    device = model.unembedding.device
    counts = ExpertCounts(experts, domains, spellings).to(device)
    for batch in batches:
        tokens, mask, documents = batch["tokens"].to(device), token_mask_or_none(batch), batch.get("document")
        output = model(
            tokens,
            None if mask is None else mask.to(device),
            documents=None if documents is None else documents.to(device),
        )
        counts.update(tokens, batch["domain"].to(device), output.routings)
    return counts.specialisation()
