"""One expert per token id, from a fixed random table: Hash Layers (arXiv 2106.04426).

    expert = table[token]        [N, 1]
    weight = 1                   [N, 1]

The table is the paper's "balanced assignment": ids from the most to the least frequent, each to the expert with the
fewest tokens so far. Experts then get about equally many tokens, unless a single id has more than an expert's fair share. The
seed breaks ties between ids and between experts.

Letters: N tokens, V token ids, E experts.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.router import Router, Routing, RoutingContext
from nlgmoe.layers.routers.fixed import fixed_routing, require_top_1
from nlgmoe.parts import RouterConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import SettingError, require, require_valid


@dataclass(frozen=True)
class HashRouterConfig(RouterConfig):
    """Settings of a hash router.

    Attributes:
        seed: seed of the table from token ids to experts; layers draw different tables.
        counts: JSON file with the number of tokens of each id in the corpus, a list of `vocab_size` numbers
            (`PileDataModule.token_counts`); null: equal numbers. Read when a new run starts; checkpoints contain the table.
    """

    ignored_in_evaluation = frozenset({"seed", "counts"})
    seed: int = 0
    counts: str | None = None

    def __post_init__(self) -> None:
        require_valid(self)

    def check(self, moe: MoEConfig) -> None:
        """See `RouterConfig`."""
        require_top_1(self, moe)

    def build(self, config: GPTConfig, block: int) -> Router:
        """See `RouterConfig`.

        Raises:
            ValueError: the file of counts is missing, or not of this vocabulary.
        """
        router = HashRouter(config.vocab_size, experts_at(config, block))
        if not router.table.is_meta:  # meta: the weights are counted, or read from a checkpoint
            counts = [1] * config.vocab_size if self.counts is None else read_counts(self.counts, config.vocab_size)
            seed = derive_seed("hash router", self.seed, block)
            router.table.copy_(torch.tensor(balanced_table(counts, router.num_experts, seed)))
        return router


class HashRouter(Router):
    """Looks up the expert of each token. Keeps all assignments except those of padding."""

    table: Tensor

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.register_buffer("table", torch.zeros(vocab_size, dtype=torch.int64))  # [V]

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """See `Router`."""
        assert context.tokens is not None, "a hash router needs token ids"
        return fixed_routing(self.table[context.tokens], x, context, self.num_experts)


def balanced_table(counts: Sequence[int], num_experts: int, seed: int) -> list[int]:
    """Return the expert of each id, `[V]`; one is added to each count, so that ids without tokens are spread too."""
    random = Random(seed)
    ids, loads = list(range(len(counts))), [(0, random.random(), expert) for expert in range(num_experts)]
    random.shuffle(ids)
    heapq.heapify(loads)
    table = [0] * len(counts)
    for token in sorted(ids, key=lambda token: -counts[token]):
        load, _, table[token] = loads[0]
        heapq.heapreplace(loads, (load + counts[token] + 1, random.random(), table[token]))
    return table


def read_counts(path: str, vocab_size: int) -> list[int]:
    """Read the number of tokens of each id."""
    remedy = "write one with PileDataModule.token_counts (docs/laboratory.md), or leave it out"
    try:
        counts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(
            f"model.config.moe.router.init_args.counts={path} cannot be read ({type(error).__name__}); {remedy}"
        ) from error
    numbers = isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)
    require(numbers, f"model.config.moe.router.init_args.counts={path} holds no list of whole numbers; {remedy}")
    require(
        len(counts) == vocab_size,
        f"model.config.moe.router.init_args.counts={path} has {len(counts)} numbers, vocab_size is {vocab_size}; {remedy}",
    )
    return counts
