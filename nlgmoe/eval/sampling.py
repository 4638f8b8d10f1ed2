"""Sampling of the next token. Letters: B sequences, V vocabulary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from nlgmoe.seeding import derive_seed
from nlgmoe.validation import SettingError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: logits are divided by `temperature`, truncated to `top_k`, then to `top_p`, and sampled.

    Args:
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely tokens; None: all tokens.
        top_p: sample among the fewest most likely tokens whose probabilities sum to at least this; None: all tokens.
        seed: seed of the random draws.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise SettingError(f"temperature={self.temperature} must be at least 0; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise SettingError(f"top_k={self.top_k} must be at least 1; leave it out for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingError(f"top_p={self.top_p} must be above 0 and at most 1; leave it out for all tokens")

    def generators(self, prompts: Sequence[Sequence[int]]) -> list[Random]:
        """Return a generator for each prompt, seeded by `seed`, the prompt, and the number of equal prompts before it.

        A sequence's draws therefore do not depend on the other prompts or their order, and equal prompts draw different texts.
        """
        seen: Counter[tuple[int, ...]] = Counter()
        generators = []
        for prompt in map(tuple, prompts):
            generators.append(Random(derive_seed("generation", self.seed, seen[prompt], *prompt)))
            seen[prompt] += 1
        return generators

    def sample(self, logits: Tensor, generators: Sequence[Random]) -> Tensor:
        """Return the next token of each sequence, `[B, V] -> [B]`; each generator draws one number."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # Subtract the maximum, so that a low temperature does not overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)).double() / max(self.temperature, 1e-6)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, dim=-1).values[:, -1:], -math.inf)
        probs = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, token = probs.sort(dim=-1, descending=True, stable=True)
            ordered[ordered.cumsum(dim=-1) - ordered >= self.top_p] = 0  # the tokens before reach top_p
            probs = torch.zeros_like(probs).scatter_(1, token, ordered)
        cumulative = probs.cumsum(dim=-1)
        # Python's generators give the same numbers for every device.
        drawn = logits.new_tensor([[generator.random()] for generator in generators])
        tokens = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)  # [B, 1]
        return tokens[:, 0].clamp_max(logits.shape[-1] - 1)
