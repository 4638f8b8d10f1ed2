"""Which token comes next: the most likely one, or one drawn from a part of the distribution.

Letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from nlgmoe.seeding import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: logits are divided by `temperature`, cut to `top_k`, then to `top_p`, and drawn from.

    Args:
        temperature: 0 takes the most likely token.
        top_k: draw among the k most likely tokens; None: among all.
        top_p: draw among the fewest most likely tokens that have this much of the probability together; None: among all.
        seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: one is out of range.
        """
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be at least 0; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1; leave it out for all tokens")

    def generators(self, prompts: Sequence[Sequence[int]]) -> list[Random]:
        """A generator for each prompt, that depends on `seed`, the prompt, and how many equal ones come before it.

        So neither neighbours nor their order change what a sequence draws, and equal prompts still draw different texts.
        """
        seen: Counter[tuple[int, ...]] = Counter()
        found = []
        for prompt in map(tuple, prompts):
            found.append(Random(derive_seed("generation", self.seed, seen[prompt], *prompt)))
            seen[prompt] += 1
        return found

    def choose(self, logits: Tensor, generators: Sequence[Random]) -> Tensor:
        """The next token of each sequence, `[B, V] -> [B]`; each generator draws one number."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # The most likely token gets 0, so that no temperature is too low for the numbers.
        logits = (logits - logits.amax(dim=-1, keepdim=True)).double() / max(self.temperature, 1e-6)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, dim=-1).values[:, -1:], -math.inf)
        probs = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, token = probs.sort(dim=-1, descending=True, stable=True)
            ordered[ordered.cumsum(dim=-1) - ordered >= self.top_p] = 0  # those before it are enough
            probs = torch.zeros_like(probs).scatter_(1, token, ordered)
        cumulative = probs.cumsum(dim=-1)
        drawn = logits.new_tensor(
            [[generator.random()] for generator in generators]
        )  # on the host: alike on any device
        found = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)  # [B, 1]
        return found[:, 0].clamp_max(logits.shape[-1] - 1)
