"""Adapter of `GPT` to lm-eval's model interface. Only this module imports lm-eval, which is an optional dependency.

Every rank gets all requests, computes its share of the batches and returns all answers (`lockstep.py`), so lm-eval does not
handle ranks.

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
from nlgmoe.eval.padding import pad_sequences
from nlgmoe.eval.sampling import Sampling
from nlgmoe.layers.attention import KVCache
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.lm_eval.lockstep import LockstepRanks
from nlgmoe.validation import RunError, SettingError

try:
    import lm_eval.api.task
    import lm_eval.tasks
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate as run_tasks
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import handle_non_serializable
except ModuleNotFoundError as missing:
    raise SettingError(
        f"zero-shot evaluation needs lm-eval ({missing.name} is missing): pip install -e '.[eval]' in the project's folder"
    ) from missing

__all__ = [
    "BUILT_IN",
    "EvaluatedGPT",
    "TaskManager",
    "handle_non_serializable",
    "load_yaml",
    "quiet_contexts",
    "run_tasks",
]

BUILT_IN = Path(lm_eval.tasks.__file__).parent  # lm-eval's own tasks, in YAML files
LOGITS_CHUNK = 1024  # tokens whose logits are computed at a time
Tokens = tuple[int, ...]
# Of each input sequence, at most `seq_len` tokens long: indices of requests, with the targets of the last positions.
ScoringBatch = list[tuple[Tokens, list[tuple[int, list[int]]]]]


@dataclass(frozen=True)
class _GenerationSettings:
    until: tuple[str, ...]
    max_new: int
    sampling: Sampling


@dataclass(frozen=True)
class _Prompt:
    index: int  # of the request; seeds its draws
    tokens: list[int]
    settings: _GenerationSettings


class EvaluatedGPT(TemplateLM):
    """Log-likelihoods and generation for lm-eval's tasks.

    Results equal those of lm-eval's `hf` model: contexts are truncated on the left to the model's length, and an empty context
    is an end-of-document token. Two cases that `hf` rejects are supported: a continuation longer than `seq_len` is scored in
    windows, and if `seq_len` or more new tokens are requested, half of the sequence is reserved for them.

    Args:
        model: in evaluation mode; its experts may be sharded over ranks.
        tokenizer: tokenizer of the model.
        batch_size: sequences per batch on a rank.
        precision: returns the context of forward passes, such as autocast.
    """

    max_gen_toks = 256  # lm-eval's default

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise RunError(f"batch_size={batch_size} must be at least 1")
        self.model, self.batch_size = model, batch_size
        self.ranks = LockstepRanks(model)
        self._tokenizer, self._precision = tokenizer, precision
        self._device = model.unembedding.device

    # ---- lm-eval's interface

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token, also used as the empty context."""
        return self._tokenizer.eod_id

    @property
    def max_length(self) -> int:
        """The maximum number of input tokens."""
        return self.model.config.seq_len

    @property
    def tokenizer_name(self) -> str:
        """The key of lm-eval's caches."""
        return self._tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text; there are no special tokens to add."""
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs: log-likelihood in nats, and True if greedy decoding gives the continuation."""
        self.ranks.agree(f"score {len(requests)} continuations")
        return self._score([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in nats: disjoint windows of targets, the last one with as much context as fits."""
        self.ranks.agree(f"score {len(requests)} texts")
        return [nats for nats, _ in self._score([self._split("", *request.args) for request in requests])]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, the end of the document or the maximum number of tokens."""
        self.ranks.agree(f"continue {len(requests)} texts")
        by_settings: dict[_GenerationSettings, list[_Prompt]] = {}
        for index, request in enumerate(requests):
            prompt = self._prompt(index, *request.args)
            by_settings.setdefault(prompt.settings, []).append(prompt)
        batches = [
            batch
            for prompts in by_settings.values()
            for batch in self._batches(prompts, lambda prompt: len(prompt.tokens))
        ]
        texts = [""] * len(requests)
        results = self.ranks.map(batches, self._continue, lambda: self._continue([]))
        for batch, continuations in zip(batches, results, strict=True):
            for prompt, text in zip(batch, continuations, strict=True):
                texts[prompt.index] = text
        return texts

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _batches(self, items: list[Any], length: Callable[[Any], int]) -> Iterator[list[Any]]:
        """Yield batches of similar length, the longest first, so that a lack of memory shows at once."""
        items = sorted(items, key=length, reverse=True)
        for first in range(0, len(items), self.batch_size):
            yield items[first : first + self.batch_size]

    # ---- scoring

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        prefix, target = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
        return prefix or [self.eot_token_id], target

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        sequences: dict[Tokens, list[tuple[int, list[int]]]] = {}  # choices that differ in their last token share one
        for index, (context, continuation) in enumerate(pairs):
            whole = context + continuation
            for start in range(len(context), len(whole), self.max_length):
                end = min(start + self.max_length, len(whole))
                tokens = tuple(whole[max(0, end - 1 - self.max_length) : end - 1])
                sequences.setdefault(tokens, []).append((index, whole[start:end]))
        batches = list(self._batches(list(sequences.items()), lambda sequence: len(sequence[0])))
        nats, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for scores in self.ranks.map(batches, self._score_batch, self._idle):
            for index, log_prob, is_greedy in scores:
                nats[index] += log_prob
                greedy[index] &= is_greedy
        return list(zip(nats, greedy, strict=True))

    @torch.no_grad()
    def _score_batch(self, batch: ScoringBatch) -> list[tuple[int, float, bool]]:
        """Return for each request of the batch its index, nats, and True if all targets are the most likely tokens."""
        indices, lengths = [], []
        rows: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        for row, (tokens, requests) in enumerate(batch):
            for index, target in requests:
                rows += [row] * len(target)
                positions += range(len(tokens) - len(target), len(tokens))
                targets += target
                indices.append(index)
                lengths.append(len(target))
        lookup = torch.tensor([rows, positions, targets], device=self._device)  # [3, N]
        log_probs, hits = [], []
        with self._precision():
            inputs = pad_sequences([tokens for tokens, _ in batch], "right", self._device)
            hidden = self.model(*inputs).hidden  # [B, T, H]
            for row_N, position_N, target_N in (part.unbind() for part in lookup.split(LOGITS_CHUNK, dim=1)):
                logits = _at_least_fp32(self.model.logits(hidden[row_N, position_N]))  # [chunk, V]
                log_probs.append(logits.log_softmax(dim=-1).gather(1, target_N[:, None])[:, 0])
                hits.append(logits.argmax(dim=-1) == target_N)
        nats, hit = torch.cat(log_probs).double().cpu(), torch.cat(hits).cpu()
        parts = zip(indices, nats.split(lengths), hit.split(lengths), strict=True)
        return [(index, float(part.sum()), bool(greedy.all())) for index, part, greedy in parts]

    @torch.no_grad()
    def _idle(self) -> None:
        """Run a forward pass so that other ranks can use this rank's experts; discard the result."""
        with self._precision():
            self.model(torch.full((1, 1), self.eot_token_id, device=self._device))

    # ---- generating

    def _prompt(self, index: int, context: str, generation_kwargs: dict[str, Any]) -> _Prompt:
        options: dict[str, Any] = dict(normalize_gen_kwargs(generation_kwargs, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until", None), eos=self._tokenizer.decode([self.eot_token_id]))
        max_new, do_sample = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature, top_k = options.pop("temperature", 0.0), options.pop("top_k", None)
        if options:
            name, value = next(iter(options.items()))
            raise RunError(
                f"generation_kwargs: {name}={value} is not known here; use until, max_gen_toks, do_sample, temperature, top_k"
            )
        if max_new >= self.max_length:
            max_new = self.max_length // 2
        tokens = self.tok_encode(context)[-(self.max_length - max_new) :] or [self.eot_token_id]
        sampling = Sampling(temperature if do_sample else 0.0, top_k)
        return _Prompt(index, tokens, _GenerationSettings(tuple(until), max_new, sampling))

    @torch.no_grad()
    def _continue(self, batch: list[_Prompt]) -> list[str]:
        """Continue the prompts; for an empty batch, run as many forward passes as other ranks."""
        if not batch:
            while self.ranks.any(False):
                self._idle()
            return []
        settings, texts, finished = batch[0].settings, [""] * len(batch), [False] * len(batch)
        tokens, mask = pad_sequences([prompt.tokens for prompt in batch], "left", self._device)
        cache, generators = KVCache(tokens.shape[1] + settings.max_new), [Random(prompt.index) for prompt in batch]
        generated: list[list[int]] = [[] for _ in batch]
        while self.ranks.any(not all(finished)):
            if all(finished):
                self._idle()
                continue
            with self._precision():
                logits = self.model.logits(self.model(tokens, mask, cache).hidden[:, -1])  # [B, V]
            sampled = settings.sampling.sample(_at_least_fp32(logits), generators)
            tokens, mask = sampled[:, None], None
            for row, token in enumerate(sampled.tolist()):
                if not finished[row]:
                    ended = token == self.eot_token_id
                    generated[row] += [] if ended else [token]
                    text = self._tokenizer.decode(generated[row])
                    texts[row] = postprocess_generated_text(text, list(settings.until), None)
                    finished[row] = ended or texts[row] != text or len(generated[row]) == settings.max_new
        return texts


def quiet_contexts() -> AbstractContextManager[Any]:
    """Disable lm-eval's progress bar for building prompts, which every rank would show."""
    return mock.patch.object(lm_eval.api.task, "tqdm", partial(lm_eval.api.task.tqdm, disable=True))


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
