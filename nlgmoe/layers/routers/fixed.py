"""Routers that do not learn: hash, and two controls, uniform and frozen.

    hash      expert = table[token]                         weight = 1      Hash Layers, arXiv 2106.04426
    uniform   expert = hash(seed, token, position) mod E    weight = 1      position without padding
    frozen    logits = x W                                  as `layers/router.py`, W ~ N(0, gate_init_std), drawn from the seed

Hash: the table is the paper's "balanced assignment": ids from the most to the least frequent, each to the expert with the fewest
tokens so far. Experts then get about equally many tokens, unless a single id has more than an expert's fair share. The seed
breaks ties between ids and between experts.

Uniform: each expert is trained on a random share of all tokens, so that none can specialise; the difference to this control
measures the effect of the choice of experts. A text has the same routing in every epoch, in training and evaluation, alone and
in a batch. The hash is a common 32-bit mix of multiplications and shifts.

Frozen: choices and weights still change with the hidden states. "Towards an empirical understanding of MoE design choices" (arXiv
2402.13089) finds it as good as a learned gate.

Letters: B sequences of T tokens, N = B * T, H hidden size, V token ids, E experts.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.router import Router, TopKRouter
from nlgmoe.layers.routing import Routing, RoutingContext
from nlgmoe.parts import ROUTER_FIELDS, RouterConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.seeding import derive_seed, draw_normal
from nlgmoe.validation import SettingError, require, require_valid

WORD = 2**32 - 1  # hashes of the uniform router are 32-bit, in int64


@dataclass(frozen=True)
class _OneExpertConfig(RouterConfig):
    """Settings of a router that chooses one expert without the hidden states.

    Attributes:
        seed: seed of the choice, which differs between layers.
    """

    ignored_in_evaluation = frozenset({"seed", "counts"})
    seed: int = 0

    def __post_init__(self) -> None:
        require_valid(self)

    def check(self, moe: MoEConfig) -> None:
        """Refuse `top_k` above 1."""
        require(moe.top_k == 1, f"top_k={moe.top_k} must be 1 with {type(self).__name__}, which chooses one expert")


def route_to(expert: Tensor, x: Tensor, context: RoutingContext, num_experts: int) -> Routing:
    """Return the routing of `x` `[N, H]` to `expert` `[B, T]`, with weight 1 in at least fp32; all but padding is kept."""
    expert = expert.reshape(-1, 1)  # [N, 1]
    mask = None if context.mask is None else context.mask.flatten()  # [N]
    kept = torch.ones_like(expert, dtype=torch.bool) if mask is None else mask.unsqueeze(-1)  # [N, 1]
    weight = kept.to(torch.promote_types(x.dtype, torch.float32))
    return Routing(expert, weight, kept, num_experts, mask)


@dataclass(frozen=True)
class HashRouterConfig(_OneExpertConfig):
    """Settings of a hash router.

    Attributes:
        seed: seed of the table from token ids to experts; layers draw different tables.
        counts: JSON file with the number of tokens of each id in the corpus, a list of `vocab_size` numbers
            (`PileDataModule.token_counts`); null: equal numbers. Read when a new run starts; checkpoints contain the table.
    """

    counts: str | None = None

    def build(self, config: GPTConfig, block: int) -> Router:
        router = HashRouter(config.vocab_size, experts_at(config, block))
        fill_table(router.table.unsqueeze(1), router.num_experts, self.counts, self.seed, block)
        return router


class HashRouter(Router):
    """Looks up the expert of each token in a table."""

    table: Tensor

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.register_buffer("table", torch.zeros(vocab_size, dtype=torch.int64))  # [V]

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        assert context.tokens is not None, "a hash router needs token ids"
        return route_to(self.table[context.tokens], x, context, self.num_experts)


def fill_table(table: Tensor, num_experts: int, counts: str | None, seed: int, block: int) -> None:
    """Write the experts of each id into `table`, `[V, k]`, unless it is on meta: it is counted, or read from a checkpoint.

    Args:
        counts: JSON file with the number of tokens of each id; None: equal numbers.
        seed: of the configuration; blocks draw different tables.
    """
    if not table.is_meta:
        vocab_size, top_k = table.shape
        of_ids = [1] * vocab_size if counts is None else read_counts(counts, vocab_size)
        drawn = balanced_table(of_ids, num_experts, derive_seed("hash router", seed, block), top_k)
        table.copy_(torch.tensor(drawn))


def balanced_table(counts: Sequence[int], num_experts: int, seed: int, top_k: int = 1) -> list[list[int]]:
    """Return k different experts of each id, `[V, k]`; one is added to each count, so that ids without tokens are spread too."""
    random = Random(seed)
    ids, loads = list(range(len(counts))), [(0, random.random(), expert) for expert in range(num_experts)]
    random.shuffle(ids)
    heapq.heapify(loads)
    table: list[list[int]] = [[]] * len(counts)
    for token in sorted(ids, key=lambda token: -counts[token]):
        lowest = [heapq.heappop(loads) for _ in range(top_k)]
        table[token] = [expert for _, _, expert in lowest]
        for load, _, expert in lowest:
            heapq.heappush(loads, (load + counts[token] + 1, random.random(), expert))
    return table


def read_counts(path: str, vocab_size: int) -> list[int]:
    """Read the number of tokens of each id."""
    setting = f"model.config.moe.router.init_args.counts={path}"
    remedy = "write one with PileDataModule.token_counts (docs/laboratory.md), or leave it out"
    try:
        counts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"{setting} cannot be read ({type(error).__name__}); {remedy}") from error
    numbers = isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)
    require(numbers, f"{setting} holds no list of whole numbers; {remedy}")
    require(len(counts) == vocab_size, f"{setting} has {len(counts)} numbers, vocab_size is {vocab_size}; {remedy}")
    return counts


@dataclass(frozen=True)
class UniformRouterConfig(_OneExpertConfig):
    """Settings of a uniform router.

    Attributes:
        seed: seed of the hash, which differs between layers. Checkpoints contain the hash.
    """

    def build(self, config: GPTConfig, block: int) -> Router:
        return UniformRouter(experts_at(config, block), derive_seed("uniform router", self.seed, block))


class UniformRouter(Router):
    """Hashes token ids and positions."""

    seed: Tensor

    def __init__(self, num_experts: int, seed: int) -> None:
        super().__init__(num_experts)
        self.register_buffer("seed", torch.tensor(seed & WORD))

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        assert context.tokens is not None and context.positions is not None, "a uniform router needs token ids"
        hashed = _mix((_mix(context.tokens ^ self.seed) + context.positions) & WORD)  # [B, T]
        return route_to(hashed % self.num_experts, x, context, self.num_experts)


def _mix(word: Tensor) -> Tensor:
    """Hash 32-bit words in int64, whose products stay below 2^59."""
    for _ in range(2):
        word = ((word >> 16) ^ word) * 0x45D9F3B & WORD
    return (word >> 16) ^ word


@dataclass(frozen=True)
class FrozenRouterConfig(RouterConfig):
    """Settings of a router with a frozen gate.

    Attributes:
        seed: seed of the gate; layers draw different gates.
    """

    reads_fields = ROUTER_FIELDS
    ignored_in_evaluation = frozenset({"seed"})
    seed: int = 0

    def __post_init__(self) -> None:
        require_valid(self)

    def build(self, config: GPTConfig, block: int) -> Router:
        assert config.moe is not None
        router = FrozenRouter(config.moe, config.hidden_size, experts_at(config, block), block)
        if not router.weight.is_meta:
            draw = draw_normal(router.weight.shape, "frozen router", self.seed, block)
            router.weight.copy_(draw * (config.moe.gate_init_std or config.init_std))
        return router


class FrozenRouter(TopKRouter):
    """The paper's router with its gate in a buffer, which is not optimised."""

    weight: Tensor  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        gate = self.weight.detach()
        del self.weight
        self.register_buffer("weight", gate)
