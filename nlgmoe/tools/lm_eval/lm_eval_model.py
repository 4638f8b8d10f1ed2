"""A GPT as lm-eval's tasks see a language model. The one place that imports lm-eval, which is an extra.

Every rank is given all requests. It works on its share of the batches, and has all answers (`in_step.py`): lm-eval need not
know of ranks, and no number of documents is too small for them.

Letters: B sequences, T positions, H hidden size, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.device import total_memory
from nlgmoe.eval.padding import pad_sequences
from nlgmoe.eval.sampling import Sampling
from nlgmoe.layers.attention import KVCache
from nlgmoe.model.gpt import GPT
from nlgmoe.model.least_memory import check_fits
from nlgmoe.tools.lm_eval.in_step import InStep

try:
    import lm_eval.api.task
    import lm_eval.tasks
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate as run_tasks
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
except ModuleNotFoundError as missing:
    raise ImportError(
        f"zero-shot evaluation needs lm-eval ({missing.name} is missing): pip install -e '.[eval]' in the project's folder"
    ) from missing

__all__ = ["BUILT_IN", "EvaluatedGPT", "TaskManager", "handle_non_serializable", "quiet_contexts", "run_tasks"]

BUILT_IN = Path(lm_eval.tasks.__file__).parent  # lm-eval's own tasks, in YAML files
LOGITS_AT_A_TIME = 1024  # tokens whose logits exist together
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class _Read:
    """One sequence that is read, and what is asked of it.

    Attributes:
        tokens: at most `seq_len`.
        asked: numbers of requests, each with the tokens that the last positions are to predict.
    """

    tokens: Tokens
    asked: list[tuple[int, list[int]]]


@dataclass(frozen=True)
class _Manner:
    """How to generate: stop strings, most new tokens, and which token comes next."""

    until: tuple[str, ...]
    max_new: int
    sampling: Sampling


@dataclass(frozen=True)
class _Prompt:
    """A request to generate: its number, which seeds its draws, and the tokens to continue."""

    number: int
    tokens: list[int]
    manner: _Manner


class EvaluatedGPT(TemplateLM):
    """Log-likelihoods and generation for lm-eval's tasks.

    The numbers are those of lm-eval's own `hf` model: contexts are cut from the left to what the model can read, and an empty
    one is an end-of-document token. Where `hf` gives up, because a continuation is longer than the model's sequences or as many
    new tokens are asked for, this goes on: such a continuation is read in windows, and half of the sequence is for new tokens.

    Args:
        model: in evaluation mode; its experts may be spread over ranks.
        tokenizer: whose ids it knows.
        batch_size: sequences read at a time, by a rank.
        precision: makes the context that forward passes run in, such as autocast.
    """

    max_gen_toks = 256  # where a task does not say; lm-eval's

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model, self.batch_size = model, batch_size
        self.ranks = InStep(model)
        self._tokenizer, self._precision = tokenizer, precision
        self._device = model.unembedding.device

    # ---- what lm-eval asks of any model

    @property
    def eot_token_id(self) -> int:
        """Ends a document, and stands for an empty context."""
        return self._tokenizer.eod_id

    @property
    def max_length(self) -> int:
        """Tokens that can be read at once."""
        return self.model.config.seq_len

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return self._tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; there are no special tokens to add."""
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): nats, and whether every token of the continuation is the likeliest."""
        self.ranks.agree(f"score {len(requests)} continuations")
        return self._score([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text: windows that do not overlap, the last one with as much before it as can be read."""
        self.ranks.agree(f"score {len(requests)} texts")
        return [nats for nats, _ in self._score([self._split("", *request.args) for request in requests])]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to a stop string, the end of the document or the most tokens."""
        self.ranks.agree(f"continue {len(requests)} texts")
        prompts = [self._prompt(number, *request.args) for number, request in enumerate(requests)]
        ways = dict.fromkeys(prompt.manner for prompt in prompts)
        batches = [
            batch
            for manner in ways
            for batch in self._batches([p for p in prompts if p.manner == manner], lambda prompt: len(prompt.tokens))
        ]
        texts = [""] * len(requests)
        done = self.ranks.share(batches, self._continue, lambda: self._continue([]))
        for batch, found in zip(batches, done, strict=True):
            for prompt, text in zip(batch, found, strict=True):
                texts[prompt.number] = text
        return texts

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _batches(self, items: list[Any], length: Callable[[Any], int]) -> Iterator[list[Any]]:
        """Longest first: sequences of a batch are about as long, and what takes too much memory does so at once."""
        items = sorted(items, key=length, reverse=True)
        if items:  # 2 bytes a value: autocast may compute in half precision
            size, memory = min(self.batch_size, len(items)), total_memory(self._device)
            check_fits(self.model.config, "batch_size", size, length(items[0]), 2, trains=False, memory=memory)
        for first in range(0, len(items), self.batch_size):
            yield items[first : first + self.batch_size]

    # ---- scoring

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
        return before or [self.eot_token_id], after

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        reads: dict[Tokens, _Read] = {}  # choices that differ in their last token are read once
        for number, (context, continuation) in enumerate(pairs):
            whole = context + continuation
            for start in range(len(context), len(whole), self.max_length):
                end = min(start + self.max_length, len(whole))
                tokens = tuple(whole[max(0, end - 1 - self.max_length) : end - 1])
                reads.setdefault(tokens, _Read(tokens, [])).asked.append((number, whole[start:end]))
        batches = list(self._batches(list(reads.values()), lambda read: len(read.tokens)))
        nats, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for found in self.ranks.share(batches, self._score_batch, self._idle):
            for number, log_probability, likeliest in found:
                nats[number] += log_probability
                greedy[number] &= likeliest
        return list(zip(nats, greedy, strict=True))

    @torch.no_grad()
    def _score_batch(self, batch: list[_Read]) -> list[tuple[int, float, bool]]:
        """Of each question: the request's number, nats, and whether every token is the likeliest."""
        with self._precision():
            hidden = self.model(
                *pad_sequences([read.tokens for read in batch], "right", self._device)
            ).hidden  # [B, T, H]
            rows: list[int] = []
            positions: list[int] = []
            targets: list[int] = []
            lengths: list[int] = []
            for row, read in enumerate(batch):
                for _, predicted in read.asked:
                    rows += [row] * len(predicted)
                    positions += range(len(read.tokens) - len(predicted), len(read.tokens))
                    targets += predicted
                    lengths.append(len(predicted))
            where = torch.tensor([rows, positions, targets], device=self._device)  # [3, N]
            log_probabilities, likeliest = [], []
            for row, position, target in (part.unbind() for part in where.split(LOGITS_AT_A_TIME, dim=1)):
                logits = _at_least_fp32(self.model.logits(hidden[row, position]))  # [chunk, V]
                log_probabilities.append(logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0])
                likeliest.append(logits.argmax(dim=-1) == target)
        nats, right = torch.cat(log_probabilities).double().cpu(), torch.cat(likeliest).cpu()
        numbers = [number for read in batch for number, _ in read.asked]
        parts = zip(numbers, nats.split(lengths), right.split(lengths), strict=True)
        return [(number, float(part.sum()), bool(hits.all())) for number, part, hits in parts]

    @torch.no_grad()
    def _idle(self) -> None:
        """A forward pass that nobody needs but the ranks that wait for this one's experts."""
        with self._precision():
            self.model(torch.full((1, 1), self.eot_token_id, device=self._device))

    # ---- generating

    def _prompt(self, number: int, context: str, settings: dict[str, Any]) -> _Prompt:
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until = handle_stop_sequences(known.pop("until", None), eos=self._tokenizer.decode([self.eot_token_id]))
        max_new, samples = known.pop("max_gen_toks"), known.pop("do_sample")
        temperature, top_k = known.pop("temperature", 0.0), known.pop("top_k", None)
        if known:
            name, value = next(iter(known.items()))
            raise ValueError(
                f"generation_kwargs: {name}={value} is not known here; use until, max_gen_toks, do_sample, temperature, top_k"
            )
        if max_new >= self.max_length:
            max_new = self.max_length // 2
        tokens = self.tok_encode(context)[-(self.max_length - max_new) :] or [self.eot_token_id]
        return _Prompt(number, tokens, _Manner(tuple(until), max_new, Sampling(temperature if samples else 0.0, top_k)))

    @torch.no_grad()
    def _continue(self, batch: list[_Prompt]) -> list[str]:
        """The continuation of each prompt; of none, as many forward passes as other ranks make."""
        if not batch:
            while self.ranks.anyone(False):
                self._idle()
            return []
        manner, texts, finished = batch[0].manner, [""] * len(batch), [False] * len(batch)
        tokens, mask = pad_sequences([prompt.tokens for prompt in batch], "left", self._device)
        cache, new, written = KVCache(tokens.shape[1] + manner.max_new), tokens, [[] for _ in batch]  # type: ignore[var-annotated]
        draws = [Random(prompt.number) for prompt in batch]
        while self.ranks.anyone(not all(finished)):
            if all(finished):
                self._idle()
                continue
            with self._precision():
                logits = self.model.logits(self.model(new, mask, cache).hidden[:, -1])  # [B, V]
            chosen = manner.sampling.sample(_at_least_fp32(logits), draws)
            new, mask = chosen[:, None], None
            for row, token in enumerate(chosen.tolist()):
                if not finished[row]:
                    ended = token == self.eot_token_id
                    written[row] += [] if ended else [token]
                    whole = self._tokenizer.decode(written[row])
                    texts[row] = postprocess_generated_text(whole, list(manner.until), None)
                    finished[row] = ended or texts[row] != whole or len(written[row]) == manner.max_new
        return texts


def quiet_contexts() -> AbstractContextManager[Any]:
    """Without lm-eval's bar for building a task's prompts, which every rank would show."""
    return mock.patch.object(lm_eval.api.task, "tqdm", partial(lm_eval.api.task.tqdm, disable=True))


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
