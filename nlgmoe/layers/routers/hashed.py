"""Hashed choice with learned weights, in the first MoE blocks: DeepSeek-V4's router.

    s      = sqrt(softplus(x W))                                  [N, E]   or another of `sigmoid.SCORES`
    expert = table[token]                                         [N, k]   k different experts
    weight = gate_scale * s[expert] / sum_k s[expert]             [N, k]   the sum if k > 1 (`normalize_weights`)

The table is drawn as that of `fixed.py`: ids from the most to the least frequent, each to the k experts with the fewest tokens so
far. The gate learns through the weights alone. Blocks from `hash_blocks` on choose by the same scores and a balancing bias
(`sigmoid.py`). DeepSeek-V4's recipe of its tables is unpublished; transformers#45643.

Letters as in `fixed.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig
from nlgmoe.layers.router import Router
from nlgmoe.layers.routers.fixed import fill_table
from nlgmoe.layers.routers.sigmoid import Score, ScoreRouter, SigmoidRouter, SigmoidRouterConfig
from nlgmoe.layers.routing import RoutingContext
from nlgmoe.pyramid import moe_blocks
from nlgmoe.seeding import RoutingNoise
from nlgmoe.validation import require


@dataclass(frozen=True)
class HashedRouterConfig(SigmoidRouterConfig):
    """Settings of a router that looks up the experts and learns their weights; the bias is that of later blocks.

    Attributes:
        scores: function of the gate's logits: `sqrtsoftplus`, `sigmoid` or `softmax`.
        hash_blocks: number of MoE blocks, from the first, with a hashed choice; null: all.
        seed: seed of the tables from token ids to experts; layers draw different tables.
        counts: JSON file with the number of tokens of each id in the corpus, as for `HashRouterConfig`; null: equal numbers.
    """

    ignored_in_evaluation = SigmoidRouterConfig.ignored_in_evaluation | {"seed", "counts"}
    scores: Score = "sqrtsoftplus"
    hash_blocks: int | None = None
    seed: int = 0
    counts: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hash_blocks is None or self.hash_blocks > 0,
            f"hash_blocks={self.hash_blocks} must be at least 1, or null",
        )

    def build(self, config: GPTConfig, block: int) -> Router:
        if self.hash_blocks is not None and block not in list(moe_blocks(config))[: self.hash_blocks]:
            return SigmoidRouter(self, config, block)
        router = HashedRouter(self.scores, config, block)
        fill_table(router.table, router.num_experts, self.counts, self.seed, block)
        return router


class HashedRouter(ScoreRouter):
    """Looks up the experts of each token, and learns their weights."""

    table: Tensor

    def __init__(self, scores: Score, config: GPTConfig, block: int) -> None:
        super().__init__(scores, config, block)
        self.register_buffer("table", torch.zeros(config.vocab_size, self.config.top_k, dtype=torch.int64))  # [V, k]

    def leave_out(self, experts: Sequence[int]) -> None:
        """Refuse: the table names the experts."""
        Router.leave_out(self, experts)

    def _choose(self, logits: Tensor, context: RoutingContext, draw: RoutingNoise) -> Tensor:
        assert context.tokens is not None, "a hashed choice needs token ids"
        return self.table[context.tokens].flatten(0, 1)  # [N, k]
