"""lm-eval's `hf` model around a `GPT`. Only this module imports lm-eval, which is an optional dependency."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.eval.chat import transformers_tokenizer
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig
from nlgmoe.tools.hugging_face.modeling_nlgmoe import NlgmoeForCausalLM
from nlgmoe.validation import SettingError

try:
    import lm_eval.tasks
    from lm_eval.evaluator import evaluate as run_tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
except ModuleNotFoundError as missing:
    raise SettingError(
        f"zero-shot evaluation needs lm-eval ({missing.name} is missing): pip install -e '.[eval]' in the project's folder"
    ) from missing

__all__ = ["BUILT_IN", "EvaluatedGPT", "TaskManager", "handle_non_serializable", "quiet", "run_tasks"]

BUILT_IN = Path(lm_eval.tasks.__file__).parent  # lm-eval's own tasks, in YAML files


class EvaluatedGPT(HFLM):
    """lm-eval's `HFLM` around a `GPT`, with the log-likelihoods and texts of the exported folder.

    `HFLM` rejects a continuation longer than `seq_len`, which PIQA has for short models; here it is scored in windows.
    If the experts are spread over ranks, every rank must make the same requests in the same order.

    Args:
        model: the model; it is set to evaluation mode.
        tokenizer: tokenizer of the model.
        batch_size: sequences per batch; the logits of all their tokens are computed at once, `[B, T, V]`.
        autocast: dtype of mixed precision; None: the weights' own.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, batch_size: int = 16, autocast: torch.dtype | None = None
    ) -> None:
        self._texts = tokenizer
        super().__init__(
            _Wrapped(model, tokenizer.eod_id),
            tokenizer=transformers_tokenizer(tokenizer),
            backend="causal",
            max_length=model.config.seq_len,
            softmax_dtype="float32",
            mixed_precision_dtype=autocast,
            batch_size=batch_size,
        )

    @property
    def max_gen_toks(self) -> int:
        """The maximum number of new tokens for tasks that set none: lm-eval's 256, or half of a shorter model."""
        return min(super().max_gen_toks, self.max_length // 2)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, each of whose bytes must have a token."""
        self._texts.check(string)
        ids: list[int] = super().tok_encode(string, *args, **kwargs)
        return ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the token ids of texts, padded, and their mask; see `tok_encode`."""
        for text in strings:
            self._texts.check(text)
        batch: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
        return batch

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score (texts, context, continuation): nats, and True if greedy decoding gives the continuation."""
        windows, owners = [], []
        for index, (texts, context, continuation) in enumerate(requests):
            for start in range(0, len(continuation), self.max_length):
                windows.append((texts, context + continuation[:start], continuation[start : start + self.max_length]))
                owners.append(index)
        nats, greedy = [0.0] * len(requests), [True] * len(requests)
        for index, (score, is_greedy) in zip(owners, super()._loglikelihood_tokens(windows, **kwargs), strict=True):
            nats[index] += score
            greedy[index] &= is_greedy
        return list(zip(nats, greedy, strict=True))


class _Wrapped(NlgmoeForCausalLM):
    """The exported class with the parameters of an existing `GPT`."""

    def __init__(self, model: GPT, eod_id: int) -> None:
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eod_id)
        with torch.device("meta"):
            super().__init__(NlgmoeConfig(**model.config.to_dict(), **special))
        self.model.gpt = model
        self.lm_head.weight = nn.Parameter(model.unembedding[: model.config.vocab_size].detach(), requires_grad=False)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Generate; each rank makes as many forward passes as the rank that generates the longest text."""
        return super().generate(*args, synced_gpus=distributed.is_initialized(), **kwargs)


@contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """Hide lm-eval's log below errors, and unless `progress`, its progress bars; it prints to standard error."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stderr(sys.stderr if progress else nowhere),
            redirect_stdout(sys.stderr),
        ):
            yield
    finally:
        logger.setLevel(level)
