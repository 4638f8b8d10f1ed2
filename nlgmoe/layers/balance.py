"""Load-balancing loss and router z-loss, over the routings of all MoE layers.

    balance = sum over layers of E * sum_e mean_n(p_e) * fraction_e          GShard, arXiv 2006.16668, algorithm 1
    z       = sum over layers of mean_n(logsumexp(logits)^2)                 ST-MoE, arXiv 2202.08906, equation 5

They are computed after the forward pass, from all layers at once: with `aux_scope` global, ranks all-reduce one small tensor a
micro-batch, and activation checkpointing does not repeat that.

Letters: N tokens of this rank's micro-batch, E experts of a layer, k experts per token.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, distributed

from nlgmoe.config import MoEConfig
from nlgmoe.layers.routing import Routing


def router_losses(routings: Sequence[Routing], aux_scope: Literal["rank", "global"] = "rank") -> tuple[Tensor, Tensor]:
    """Compute the load-balancing loss and the z-loss of a micro-batch, two scalars in at least fp32, without coefficients.

    The balance loss of a layer is 1 when balanced, E when all tokens choose one expert. Its fraction counts assignments before
    dropping: first choices for k = 2, all of them over k for k > 2. A router without probabilities has no balance loss, one
    without logits no z-loss.

    Args:
        aux_scope: `rank` uses this rank's loads; `global` uses the loads of all ranks together: the mean of the ranks' losses
            is then the loss of their whole batch, and so is its gradient. A collective.
    """
    dtype = routings[0].weight.dtype
    loads = [routing.requests(_choices_counted(routing)).to(dtype) for routing in routings]  # [E] each
    tokens = routings[0].num_tokens.to(dtype)
    if aux_scope == "global" and distributed.is_initialized():
        # The mean of the ranks' losses is the loss of the whole batch if each rank takes its own probabilities, the mean load
        # over ranks, and the mean number of tokens.
        shared = torch.cat([*loads, tokens[None]])
        distributed.all_reduce(shared)
        shared /= distributed.get_world_size()
        loads, tokens = list(shared[:-1].split([len(load) for load in loads])), shared[-1]
    tokens = tokens.clamp_min(torch.finfo(dtype).eps)
    balance, z = [tokens.new_zeros(())], [tokens.new_zeros(())]
    for routing, load in zip(routings, loads, strict=True):
        if routing.probs is not None:
            fraction = load / (_choices_counted(routing) * tokens)
            mean_prob = routing.unpadded(routing.probs).sum(dim=0) / tokens
            balance.append(len(load) * (mean_prob * fraction).sum())
        if routing.logits is not None:
            z.append(routing.unpadded(routing.logits.logsumexp(dim=-1).square()).sum() / tokens)
    return torch.stack(balance).sum(), torch.stack(z).sum()


def add_router_losses(loss: Tensor, moe: MoEConfig, routings: Sequence[Routing]) -> tuple[Tensor, dict[str, Tensor]]:
    """Add all losses of the routers to `loss`. A collective with `aux_scope` global.

    Returns the sum, and the losses by name without their coefficients.
    """
    balance, z_loss = router_losses(routings, moe.aux_scope)
    loss_coeff, z_loss_coeff = moe.loss_coefficients
    if loss_coeff:
        loss = loss + loss_coeff * balance
    if z_loss_coeff:  # else logits that overflow would make the loss NaN by 0 * infinity
        loss = loss + z_loss_coeff * z_loss
    terms = {"balance_loss": balance, "z_loss": z_loss}
    for name in {name: None for routing in routings for name in routing.losses}:
        terms[name] = torch.stack([routing.losses[name] for routing in routings if name in routing.losses]).sum()
        loss = loss + terms[name]
    return loss, terms


def _choices_counted(routing: Routing) -> int:
    """Return how many of a token's choices the loads count."""
    top_k = routing.expert.shape[1]
    return 1 if top_k <= 2 else top_k
