"""A top-k router whose gradient is that of all experts: DenseMixer.

    p      = softmax(x W)                               [N, E]   in at least fp32
    weight = p_i               for the `chosen` largest p_i
             p_i - detach(p_i) for the others           0, with the gradient of p_i (straight-through)

The value of the layer is that of top-`chosen` without renormalisation, and so are the gradients of the experts. The router's is
sum_i <dL/dy, expert_i(x)> dp_i/dW over all experts instead of the chosen.

Source: github.com/yaof20/DenseMixer (2025); merged in marin#7212, without effect in marin#7427; Megatron-LM#4169.

    moe: {num_experts: 16, top_k: 16, router: {class_path: dense_mixer.DenseMixerConfig, init_args: {chosen: 1}}}

`top_k` is the number of experts that are computed in training, all for the method; evaluation computes the `chosen` ones.
Cost: the experts' FLOPs in training are `top_k / chosen` times those of top-`chosen`, which `nlgmoe inspect` counts. The source
needs one more forward pass of the others only; here their backward pass, with weights of 0, is computed too.
Statistics: loads count all `top_k` experts of a token, and say nothing if these are all. So the balance loss of the package would
be a constant: the router has its own, over the chosen experts.

Rule: judged by `make gate`, 8 pairs, margin 0.02, rule of docs/gate.md; expected: see dense_mixer.yaml, which sets `top_k`.
Letters: N tokens, E experts, H hidden size.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe import GPTConfig, MoEConfig, Router, RouterConfig, Routing, RoutingContext, experts_at


@dataclass(frozen=True)
class DenseMixerConfig(RouterConfig):
    """Settings of DenseMixer.

    Attributes:
        chosen: experts per token that are in the output, fewer than `top_k`.
        balance_coeff: weight of the balance loss of the chosen experts.
    """

    chosen: int = 1
    balance_coeff: float = 0.01

    def check(self, moe: MoEConfig) -> None:
        """See `RouterConfig`."""
        if not 1 <= self.chosen < moe.top_k:
            raise ValueError(
                f"chosen={self.chosen} must be from 1 to below top_k={moe.top_k}; set top_k to num_experts"
            )

    def build(self, config: GPTConfig, block: int) -> Router:
        """See `RouterConfig`."""
        assert config.moe is not None
        return DenseMixer(self, config.hidden_size, experts_at(config, block), config.moe.top_k)


class DenseMixer(Router):
    """Computes `top_k` experts, of which `chosen` are in the output."""

    roles: ClassVar = {"weight": "weight"}
    estimated_gradient = True

    def __init__(self, settings: DenseMixerConfig, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts)
        self.settings, self.top_k = settings, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """See `Router`."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(dtype), self.weight.to(dtype))  # [N, E]
            probs = logits.softmax(dim=-1)
        p, expert = probs.topk(self.top_k, dim=-1)  # [N, top_k]
        chosen = torch.arange(self.top_k, device=x.device) < self.settings.chosen  # [top_k]
        mask = None if context.mask is None else context.mask.flatten()  # [N]
        real = torch.ones_like(p[:, :1], dtype=torch.bool) if mask is None else mask.unsqueeze(-1)  # [N, 1]
        kept = real & (chosen | self.training)  # [N, top_k]
        weight = torch.where(chosen, p, p - p.detach()).masked_fill(~kept, 0)
        # As the package's: E * sum_e mean_n(p_e) * (share of the choices that are e)
        tokens = real.sum().clamp_min(1)
        requests = F.one_hot(expert[:, : self.settings.chosen], self.num_experts).sum(dim=1)  # [N, E]
        share, mean = ((values * real).sum(dim=0) / tokens for values in (requests / self.settings.chosen, probs))
        loss = self.settings.balance_coeff * self.num_experts * (share * mean).sum()
        losses = {"chosen_balance_loss": loss}
        return Routing(expert, weight, kept, self.num_experts, mask, logits, probs, losses)
