"""Text from a model, token by token, with a key-value cache: `stream` is the loop, the others collect what it gives.

Prompts of a batch may have different lengths: shorter ones are padded on the left, and padding is seen by nobody, has no
position and visits no expert. A sequence that has come to its end leaves the batch.

Letters in shape comments: B sequences that still go on, T new positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import torch
from torch import Tensor

from nlgmoe.eval.padding import padded
from nlgmoe.eval.sampling import Sampling
from nlgmoe.layers.attention import KVCache
from nlgmoe.model.first_non_finite import require_finite_logits
from nlgmoe.model.gpt import GPT

Prompts = Sequence[Sequence[int]] | Tensor
End = Literal["end_of_document", "max_new_tokens", "seq_len"]


@dataclass(frozen=True)
class NewToken:
    """A token that was just generated.

    Attributes:
        sequence: number of its prompt.
        token: its id.
        log_prob: nats, under the model's whole distribution whatever the sampling.
        end: why it is the last of its sequence; None: it is not.
    """

    sequence: int
    token: int
    log_prob: float
    end: End | None


@dataclass
class Completion:
    """What was generated for a prompt.

    Attributes:
        tokens: ids, with the end-of-document token if it came to that.
        log_prob: nats of all of them together.
        end: what ended it.
    """

    tokens: list[int] = field(default_factory=list)
    log_prob: float = 0.0
    end: End = "max_new_tokens"


def generate(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    top_p: float | None = None,
    stop_id: int | None = None,
) -> list[list[int]]:
    """Continue `prompts`: each with what was generated for it, in one batch.

    Args:
        model: in evaluation mode.
        prompts: token ids, of one length or of several, each at least one (an end-of-document token begins a text).
        max_new_tokens: most tokens to add; a sequence ends where it is as long as the model's `seq_len`.
        temperature: see `Sampling`, as `top_k`, `top_p` and `seed`.
        stop_id: a sequence ends with this token, the end of a document; None: it goes on.

    Raises:
        ValueError: a prompt leaves no room, or a setting is out of range.
    """
    texts = _as_lists(prompts)
    sampling = Sampling(temperature, top_k, top_p, seed)
    completions = complete(model, texts, max_new_tokens, sampling, stop_id, max(1, len(texts)))
    return [text + completion.tokens for text, completion in zip(texts, completions, strict=True)]


def complete(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_id: int | None = None,
    batch_size: int = 16,
) -> list[Completion]:
    """What the model adds to each of any number of prompts, `batch_size` of about the same length at a time; as `generate`.

    Raises:
        ValueError: as `generate`, before anything is generated.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    texts = _as_lists(prompts)
    check(model, texts, max_new_tokens)
    generators = sampling.generators(texts)
    completions = [Completion() for _ in texts]
    by_length = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for start in range(0, len(texts), batch_size):
        numbers = by_length[start : start + batch_size]
        drawn = [generators[number] for number in numbers]
        for new in _stream(model, [texts[n] for n in numbers], max_new_tokens, sampling, stop_id, drawn):
            completion = completions[numbers[new.sequence]]
            completion.tokens.append(new.token)
            completion.log_prob += new.log_prob
            completion.end = new.end or completion.end
    return completions


def stream(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_id: int | None = None,
) -> Iterator[NewToken]:
    """The tokens of one batch as they come: one of each sequence that goes on, then the next of each; as `generate`.

    Raises:
        ValueError: as `generate`, at once and not at the first token.
    """
    texts = _as_lists(prompts)
    check(model, texts, max_new_tokens)
    return _stream(model, texts, max_new_tokens, sampling, stop_id, sampling.generators(texts))


def check(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse what cannot be generated.

    Raises:
        ValueError: a prompt is empty, leaves no room or has unknown ids, or `max_new_tokens` is out of range.
    """
    config = model.config
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; begin a text with an end-of-document token")
        if len(prompt) >= config.seq_len:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, and with seq_len={config.seq_len} the model reads at most "
                f"{config.seq_len - 1} before it goes on; shorten it"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {number} has token ids outside the model's vocabulary of {config.vocab_size}")


@torch.no_grad()
def _stream(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_id: int | None,
    generators: list[Random],
) -> Iterator[NewToken]:
    if not prompts:
        return
    tokens, mask = padded(prompts, "left", model.token_embedding.weight.device)
    rooms = [min(max_new_tokens, model.config.seq_len - len(prompt)) for prompt in prompts]
    cache = KVCache(tokens.shape[1] + max(rooms) - 1)  # the last token is not read
    going = list(range(len(prompts)))  # the prompts that the batch's rows stand for
    made = 0
    while going:
        hidden = model(tokens, mask, cache=cache).hidden[:, -1]  # [B, H]
        logits = model.logits(hidden).float()  # [B, V]
        require_finite_logits(model, logits)
        chosen = sampling.choose(logits, [generators[number] for number in going])  # [B]
        log_probs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
        made += 1
        rows, ids = [], chosen.tolist()
        for row, (number, token, log_prob) in enumerate(zip(going, ids, log_probs.tolist(), strict=True)):
            end: End | None = None
            if token == stop_id:
                end = "end_of_document"
            elif made == rooms[number]:
                end = "max_new_tokens" if made == max_new_tokens else "seq_len"
            else:
                rows.append(row)
            yield NewToken(number, token, log_prob, end)
        if len(rows) < len(going):
            kept = torch.tensor(rows, device=chosen.device, dtype=torch.long)
            going, chosen = [going[row] for row in rows], chosen[kept]
            cache.select(kept)
        tokens, mask = chosen[:, None], None  # [B, 1]


def _as_lists(prompts: Prompts) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.dtype != torch.long:
            raise ValueError(
                f"prompts must be [B, T] int64, or lists of ids, not {list(prompts.shape)} {prompts.dtype}"
            )
        return [[int(token) for token in row] for row in prompts.tolist()]
    return [[int(token) for token in prompt] for prompt in prompts]
