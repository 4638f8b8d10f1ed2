"""Text generation with a key-value cache: `stream` yields tokens, `complete` and `generate` collect them.

Shorter prompts of a batch are padded on the left; padding is masked, has no position and is not routed. A finished sequence
is removed from the batch.

Letters in shape comments: B unfinished sequences, T new positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nlgmoe.layers.attention import KVCache
from nlgmoe.model.gpt import GPT
from nlgmoe.non_finite import require_finite_logits
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import SettingError, require, require_at_least


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
        temperature, top_p, remedy = self.temperature, self.top_p, "; leave it out for all tokens"
        is_valid = 0 <= temperature < math.inf
        require(is_valid, f"temperature={temperature} must be at least 0; 0 takes the most likely token")
        require_at_least(1, self, "top_k", remedy=remedy)
        require(top_p is None or 0 < top_p <= 1, f"top_p={top_p} must be above 0 and at most 1{remedy}")

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


EndReason = Literal["stop", "max_new_tokens", "seq_len"]


@dataclass(frozen=True)
class NewToken:
    """A generated token."""

    sequence: int  # index of the prompt
    token: int  # id
    end: EndReason | None  # reason for which the sequence ends with this token; None: it continues


@dataclass
class Completion:
    """The tokens generated for one prompt."""

    tokens: list[int] = field(default_factory=list)  # ids, with the stop token if the sequence ended with one
    end: EndReason = "max_new_tokens"  # reason for which the sequence ended


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
) -> list[list[int]]:
    """Continue `prompts` in one batch; return each prompt followed by its generated tokens.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids, at least one per prompt (an end-of-document token begins a text); lengths may differ.
        max_new_tokens: maximum number of tokens to add; a sequence also ends at the model's `seq_len`.
        temperature: see `Sampling`, as for `top_k`, `top_p` and `seed`.
        stop_ids: a sequence ends with one of these tokens, usually `Tokenizer.stop_ids`.

    Raises:
        ValueError: a prompt is too long, or a setting is out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    completions = complete(model, prompts, max_new_tokens, sampling, stop_ids, max(1, len(prompts)))
    return [[*prompt, *completion.tokens] for prompt, completion in zip(prompts, completions, strict=True)]


def complete(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: Collection[int] = (),
    batch_size: int = 16,
) -> list[Completion]:
    """Generate a completion of each prompt, in batches of `batch_size` prompts of similar length; arguments as for `generate`."""
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    check_prompts(model, prompts, max_new_tokens)
    generators = sampling.generators(prompts)
    completions = [Completion() for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), batch_size):
        batch = by_length[start : start + batch_size]
        prompt_generators = [generators[index] for index in batch]
        for new in _stream(model, [prompts[i] for i in batch], max_new_tokens, sampling, stop_ids, prompt_generators):
            completion = completions[batch[new.sequence]]
            completion.tokens.append(new.token)
            completion.end = new.end or completion.end
    return completions


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: Collection[int] = (),
) -> Iterator[NewToken]:
    """Yield the tokens of one batch: one token of each unfinished sequence per forward pass; arguments as for `generate`."""
    check_prompts(model, prompts, max_new_tokens)
    return _stream(model, prompts, max_new_tokens, sampling, stop_ids, sampling.generators(prompts))


def check_prompts(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Check that the model can continue the prompts."""
    config = model.config
    require(not model.training, "the model is in training mode; call model.eval() first")
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    for number, prompt in enumerate(prompts, 1):
        require(bool(prompt), f"prompt {number} is empty; begin a text with an end-of-document token")
        if len(prompt) >= config.seq_len:
            raise SettingError(
                f"prompt {number} has {len(prompt)} tokens, and with seq_len={config.seq_len} the model reads at most "
                f"{config.seq_len - 1} before the first new token; shorten it"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise SettingError(f"prompt {number} has token ids outside the model's vocabulary of {config.vocab_size}")


@torch.no_grad()
def _stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    generators: list[Random],
) -> Iterator[NewToken]:
    if not prompts:
        return
    tokens, mask = _pad_left(prompts, model.token_embedding.weight.device)
    limits = [min(max_new_tokens, model.config.seq_len - len(prompt)) for prompt in prompts]
    cache = KVCache(tokens.shape[1] + max(limits) - 1)  # the last token is not read
    unfinished = list(range(len(prompts)))  # index of each row's prompt
    num_new = 0
    while unfinished:
        hidden = model(tokens, mask, cache=cache).hidden[:, -1]  # [B, H]
        logits = model.logits(hidden).float()  # [B, V]
        require_finite_logits(model, logits)
        sampled = sampling.sample(logits, [generators[index] for index in unfinished])  # [B]
        num_new += 1
        rows = []
        for row, (index, token) in enumerate(zip(unfinished, sampled.tolist(), strict=True)):
            end: EndReason | None = None
            if token in stop_ids:
                end = "stop"
            elif num_new == limits[index]:
                end = "max_new_tokens" if num_new == max_new_tokens else "seq_len"
            else:
                rows.append(row)
            yield NewToken(index, token, end)
        if len(rows) < len(unfinished):
            kept = torch.tensor(rows, device=sampled.device, dtype=torch.long)
            unfinished, sampled = [unfinished[row] for row in rows], sampled[kept]
            cache.select(kept)
        tokens, mask = sampled[:, None], None  # [B, 1]


def _pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return tokens `[B, T]` padded with 0, and a bool mask `[B, T]`, False at padding; None without padding."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    tokens = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True, padding_side="left")
    return tokens.to(device), None if bool(mask.all()) else mask.to(device)
