"""The routing of hash and uniform routers: one expert per token, chosen without the hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from nlgmoe.config import MoEConfig
from nlgmoe.layers.router import Routing, RoutingContext
from nlgmoe.parts import RouterConfig
from nlgmoe.validation import require


def fixed_routing(expert: Tensor, x: Tensor, context: RoutingContext, num_experts: int) -> Routing:
    """Return the routing with weight 1, in at least fp32; all but padding is kept.

    Args:
        expert: `[B, T]` int64.
        x: `[N, H]` hidden states, for their dtype.
        context: context of the micro-batch.
        num_experts: E.
    """
    expert = expert.reshape(-1, 1)  # [N, 1]
    mask = None if context.mask is None else context.mask.flatten()  # [N]
    kept = torch.ones_like(expert, dtype=torch.bool) if mask is None else mask.unsqueeze(-1)  # [N, 1]
    weight = kept.to(torch.promote_types(x.dtype, torch.float32))
    return Routing(expert, weight, kept, num_experts, mask, all_kept=mask is None)


def require_top_1(router: RouterConfig, moe: MoEConfig) -> None:
    """Refuse `top_k` above 1."""
    require(moe.top_k == 1, f"top_k={moe.top_k} must be 1 with {type(router).__name__}, which chooses one expert")
