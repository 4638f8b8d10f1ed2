"""A control: a pseudo-random expert by token id and position, the same in every epoch and batch, without learning.

    expert = hash(seed, token, position) mod E        [N, 1]   position without padding
    weight = 1                                        [N, 1]

Each expert is trained on a random share of all tokens, so that none can specialise; the difference to this control measures
the effect of the choice of experts. A text has the same routing in training and evaluation, alone and in a batch. The hash is a
common 32-bit mix of multiplications and shifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.router import Router, Routing, RoutingContext
from nlgmoe.layers.routers.fixed import fixed_routing, require_top_1
from nlgmoe.parts import RouterConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import require_valid

WORD = 2**32 - 1  # hashes are 32-bit, in int64


@dataclass(frozen=True)
class UniformRouterConfig(RouterConfig):
    """Settings of a uniform router.

    Attributes:
        seed: seed of the hash, which differs between layers. Checkpoints contain the hash.
    """

    ignored_in_evaluation = frozenset({"seed"})
    seed: int = 0

    def __post_init__(self) -> None:
        require_valid(self)

    def check(self, moe: MoEConfig) -> None:
        """See `RouterConfig`."""
        require_top_1(self, moe)

    def build(self, config: GPTConfig, block: int) -> Router:
        """See `RouterConfig`."""
        seed = derive_seed("uniform router", self.seed, block)
        return UniformRouter(experts_at(config, block), seed)


class UniformRouter(Router):
    """Hashes token ids and positions."""

    seed: Tensor

    def __init__(self, num_experts: int, seed: int) -> None:
        super().__init__(num_experts)
        self.register_buffer("seed", torch.tensor(seed & WORD))

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """See `Router`."""
        assert context.tokens is not None and context.positions is not None, "a uniform router needs token ids"
        hashed = _mix((_mix(context.tokens ^ self.seed) + context.positions) & WORD)  # [B, T]
        return fixed_routing(hashed % self.num_experts, x, context, self.num_experts)


def _mix(word: Tensor) -> Tensor:
    """Hash 32-bit words in int64, whose products stay below 2^59."""
    for _ in range(2):
        word = ((word >> 16) ^ word) * 0x45D9F3B & WORD
    return (word >> 16) ^ word
