"""Counts for `Specialisation`, from the routings of evaluated batches, added up over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from nlgmoe.batch import Batch
from nlgmoe.eval.specialisation import Specialisation
from nlgmoe.eval.token_classes import CLASSES, class_ids
from nlgmoe.layers.router import Routing, count
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import experts_per_layer


class ExpertCounts(Metric):
    """How often tokens of each domain and class asked for each expert.

    One `scatter_add` a layer and batch, on the device; nothing is read by the host before `compute`.

    Args:
        experts: of each MoE layer.
        domains: names; a batch's domain ids index them.
        spellings: `[V]` bytes of text that each token id stands for; None: not known, all tokens are of one class.
    """

    counts: Tensor
    classes: Tensor | None

    def __init__(self, experts: Sequence[int], domains: Sequence[str], spellings: Sequence[bytes] | None) -> None:
        super().__init__()
        self.experts, self.domains = list(experts), list(domains)
        self.class_names = list(CLASSES) if spellings is not None else ["all"]
        known = None if spellings is None else torch.tensor(class_ids(spellings))
        self.register_buffer("classes", known, persistent=False)
        groups = len(self.domains) * len(self.class_names)
        zeros = torch.zeros(len(self.experts), groups, max(self.experts), dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, tokens: Tensor, domain: Tensor, routings: Sequence[Routing]) -> None:
        """Add a batch.

        Args:
            tokens: `[B, T]` ids that the model read.
            domain: `[B]` domain ids.
            routings: one for each MoE layer.
        """
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
        """`[D, C, L, E]` of all ranks."""
        by_layer = self.counts.unflatten(1, (len(self.domains), len(self.class_names)))  # [L, D, C, E]
        return by_layer.permute(1, 2, 0, 3)

    def specialisation(self, step: int | None = None) -> Specialisation:
        """What was counted, by all ranks, which have to call this together."""
        counts = self.compute().cpu().numpy()
        return Specialisation(counts, self.domains, self.class_names, self.experts, step)


@torch.no_grad()
def count_experts(
    model: GPT, batches: Iterable[Batch], domains: Sequence[str], spellings: Sequence[bytes] | None = None
) -> Specialisation:
    """What a model's experts are used for in some text.

        trained = load_trained("runs/quickstart")
        data.setup()  # a PileDataModule
        found = count_experts(trained.model, data.val_dataloader(), data.domains, data.token_spellings())

    Args:
        model: with MoE layers, in evaluation mode.
        batches: as a data module yields them.
        domains: names; a batch's domain ids index them.
        spellings: bytes of text that each token id stands for; None: do not tell classes of tokens apart.

    Raises:
        ValueError: the model is dense, or in training mode.
    """
    experts = [number for number in experts_per_layer(model.config) if number]
    if not experts:
        raise ValueError("the model has no experts: it is dense")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    device = model.unembedding.device
    counts = ExpertCounts(experts, domains, spellings).to(device)
    for batch in batches:
        tokens, mask = batch["tokens"].to(device), batch["token_mask"].to(device)
        documents = batch.get("document")
        output = model(tokens, mask, documents=None if documents is None else documents.to(device))
        counts.update(tokens, batch["domain"].to(device), output.routings)
    return counts.specialisation()
