"""Text from a model, token by token, with a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from nlgmoe.layers.attention import KVCache
from nlgmoe.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT, prompt: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> Tensor:
    """Continue `prompt`.

    Args:
        model: in evaluation mode.
        prompt: `[B, T]` token ids, T at least 1 (an end-of-document token begins a text).
        max_new_tokens: tokens to add; the whole must fit the model's `seq_len`.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: sample among the k most likely tokens only; None means all.
        seed: of the sampling.

    Returns:
        `[B, T + max_new_tokens]`.

    Raises:
        ValueError: the result would not fit, or a setting is out of range.
    """
    if prompt.dim() != 2 or prompt.dtype != torch.long or prompt.shape[1] == 0:
        raise ValueError(f"prompt must be [B, T] int64 with T >= 1, not {list(prompt.shape)} {prompt.dtype}")
    if int(prompt.min()) < 0 or int(prompt.max()) >= model.config.vocab_size:
        raise ValueError(f"prompt has token ids outside the model's vocabulary of {model.config.vocab_size}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    total = prompt.shape[1] + max_new_tokens
    if total > model.config.seq_len:
        raise ValueError(
            f"prompt + max_new_tokens is {total} tokens, but the model's seq_len is {model.config.seq_len}"
        )
    if max_new_tokens < 1 or not 0 <= temperature < float("inf") or (top_k is not None and top_k < 1):
        raise ValueError("generate needs max_new_tokens >= 1, temperature >= 0 and top_k >= 1 (or None)")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    cache = KVCache(total)
    tokens, new = prompt, prompt
    for _ in range(max_new_tokens):
        hidden = model(new, cache=cache).hidden[:, -1]  # [B, H]
        logits = model.logits(hidden).float()  # [B, V]
        if temperature == 0:
            new = logits.argmax(dim=-1, keepdim=True)
        else:
            if top_k is not None and top_k < logits.shape[-1]:
                threshold = logits.topk(top_k, dim=-1).values[:, -1:]
                logits = logits.masked_fill(logits < threshold, float("-inf"))
            new = torch.multinomial(
                ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-6)).softmax(dim=-1),
                1,
                generator=generator,
            )
        tokens = torch.cat([tokens, new], dim=1)
    return tokens
