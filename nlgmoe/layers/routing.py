"""ROUTING: what a router gets besides the hidden states, and what it returns for a micro-batch.

Letters: B sequences of T tokens, N = B * T tokens of this rank's micro-batch, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nlgmoe.validation import RunError


@dataclass(frozen=True)
class RoutingContext:
    """Inputs of a router besides the hidden states; the model builds one for each micro-batch.

    Attributes:
        tokens: `[B, T]` int64 ids; None if a layer is called without a model.
        mask: `[B, T]` bool, False at padding, which takes no capacity and counts in no loss or statistic; None: no padding.
        noise_key: (seed, step, micro-batch index over all ranks): determines every random draw. None: torch's global generator.
        positions: `[1 or B, T]` int64 position of each token in its document, padding not counted; None as for `tokens`.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    noise_key: tuple[int, ...] | None = None
    positions: Tensor | None = None

    def num_sequences(self, num_tokens: int) -> int:
        """Return the number of sequences B of `num_tokens` N tokens; 1 if a layer is called without a model."""
        shaped = self.tokens if self.positions is None else self.positions
        return 1 if shaped is None else num_tokens // max(1, shaped.shape[-1])


@dataclass(frozen=True)
class Routing:
    """The routing of one micro-batch in one MoE layer. Shapes and types are checked, without reading a value of the device.

    Attributes:
        expert: `[N, k]` chosen experts, first choice first.
        weight: `[N, k]` weight of each choice in the output, in at least fp32; 0 where dropped.
        kept: `[N, k]` bool; False for assignments over capacity and for padding.
        num_experts: E.
        token_mask: `[N]` bool, False at padding; None: no padding.
        logits: `[N, E]` of the gate, in at least fp32; None for a router without a gate, which has no z-loss.
        probs: `[N, E]` the gate's distribution; None for a router that has none, and so no balance loss.
        losses: name -> scalar; losses of the router's own, coefficients applied.
        capacity: an upper bound on the kept assignments of each expert, the same on all ranks; None: none is known.
        statistic: int64 tensor of a fixed shape that `Router.after_step` gets, summed over the micro-batches and ranks of a step;
            None: `tokens_per_expert`.
        expert_share: `[N]` the routed experts' share of the weights in a residual mix (the rest: the shared expert's), detached:
            c_0 of the learned mix, 1 / (1 + g) of the sigmoid one (`moe.py`); else None.

    Raises:
        ValueError: a field has another shape or type.
    """

    expert: Tensor
    weight: Tensor
    kept: Tensor
    num_experts: int
    token_mask: Tensor | None = None
    logits: Tensor | None = None
    probs: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    capacity: int | None = None
    statistic: Tensor | None = None
    expert_share: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "kept"):
            if (shape := getattr(self, name).shape) != self.expert.shape:
                raise RunError(
                    f"Routing has {name} of {list(shape)}, and expert of {list(self.expert.shape)}; both are [tokens, top_k]"
                )
        gate = (len(self.expert), self.num_experts)
        for name in ("logits", "probs"):
            value = getattr(self, name)
            if value is not None and value.shape != gate:
                raise RunError(f"Routing has {name} of {list(value.shape)}, not [tokens, num_experts] = {list(gate)}")
        if self.statistic is not None and self.statistic.dtype != torch.int64:
            raise RunError(
                f"Routing has statistic of {self.statistic.dtype}; count in torch.int64, whose sums are exact"
            )
        for name in self.losses:
            if not name.endswith("_loss") or name in ("balance_loss", "z_loss", "distillation_loss"):
                raise RunError(f"Routing has loss {name}; give it a name of its own that ends with _loss")

    @cached_property
    def tokens_per_expert(self) -> Tensor:
        """Assignments requested of each expert, before dropping, `[E]` int64."""
        return self._requests(self.expert)

    @property
    def step_statistic(self) -> Tensor:
        """What `Router.after_step` gets, of this micro-batch and rank."""
        return self.tokens_per_expert if self.statistic is None else self.statistic

    def requests(self, choices: int) -> Tensor:
        """Count the requests by the first `choices` of each token, `[E]` int64."""
        return self.tokens_per_expert if choices == self.expert.shape[1] else self._requests(self.expert[:, :choices])

    def _requests(self, expert: Tensor) -> Tensor:
        if self.token_mask is None:
            return count(expert, self.num_experts)
        return count(torch.where(self.token_mask.unsqueeze(-1), expert, self.num_experts), self.num_experts + 1)[:-1]

    def unpadded(self, values: Tensor) -> Tensor:
        """Return `values`, `[N]` or `[N, columns]`, with zeros for padding."""
        mask = self.token_mask
        return values if mask is None else torch.where(mask if values.dim() == 1 else mask.unsqueeze(-1), values, 0)

    @property
    def num_tokens(self) -> Tensor:
        """Tokens that are not padding, a scalar."""
        if self.token_mask is None:
            return self.expert.new_full((), len(self.expert))
        return self.token_mask.sum()


def count(values: Tensor, kinds: int) -> Tensor:
    """Count each of 0, ..., `kinds` - 1 in `values`, int64, without the synchronisation of `bincount`."""
    return values.new_zeros(kinds).scatter_add_(0, values.flatten(), values.new_ones(()).expand(values.numel()))
