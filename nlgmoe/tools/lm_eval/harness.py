"""lm-eval's side of an evaluation: its `hf` model around a `GPT`, and its tasks. Only this module imports lm-eval.

`lm_eval.evaluate` is called, not `simple_evaluate`: that returns None where LOCAL_RANK is not 0, lists the packages and devices
of the machine at each call (a second), and has no place at which all ranks agree that a task cannot be loaded.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from nlgmoe.cli.errors import did_you_mean
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.eval.chat import transformers_tokenizer
from nlgmoe.model.gpt import GPT
from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig
from nlgmoe.tools.hugging_face.modeling_nlgmoe import NlgmoeForCausalLM
from nlgmoe.validation import RunError, SettingError, require

try:
    from lm_eval.evaluator import evaluate as run_tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table
except ModuleNotFoundError as missing:
    raise SettingError(
        f"zero-shot evaluation needs lm-eval ({missing.name} is missing): pip install -e '.[eval]' in the project's folder"
    ) from missing

__all__ = ["EvaluatedGPT", "Tasks", "describe", "handle_non_serializable", "make_table", "quiet"]

SEED = 1234  # lm-eval's


class EvaluatedGPT(HFLM):
    """lm-eval's `HFLM` around a `GPT`, with the log-likelihoods and texts of the exported folder.

    `HFLM` rejects a continuation longer than `seq_len`, which PIQA has for short models; here it is scored in windows. It sets
    the model to evaluation mode, and computes the logits of all tokens of a batch at once, `[B, T, V]`.
    If the experts are spread over ranks, every rank must make the same requests in the same order.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int = 16, autocast: Any = None) -> None:
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

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Keep the head's weights: lm-eval would tie them to the whole table, whose padding gets no logits."""

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


class Tasks:
    """Some of lm-eval's tasks, groups or tags; the arguments are those of `ZeroShotEval`."""

    def __init__(self, names: Sequence[str], include_path: str | None, limit: int | None = None) -> None:
        require(bool(names), "tasks= names no task; name at least one, such as lambada_openai")
        require(include_path is None or Path(include_path).is_dir(), f"include_path={include_path} is not a folder")
        self._limit = limit
        self._loaded: dict[str, dict[str, Any]] = {}
        self._manager = TaskManager(include_path=include_path, include_defaults=False)
        index = self._manager.task_index
        for name in names:  # lm-eval leaves out a file that it cannot read, and takes its own task of that name
            if include_path is not None and name not in index and (file := Path(include_path, f"{name}.yaml")).exists():
                raise SettingError(f"include_path={include_path}: {file} cannot be read as a task; correct it")
        if not all(name in index and index[name].kind.name == "TASK" for name in names):
            self._manager = TaskManager(include_path=include_path)  # 20 seconds for 14,000 built-in tasks
        for name in names:
            if name not in (index := self._manager.task_index):
                close = did_you_mean(name, index)
                remedy = "tasks of your own need include_path"
                raise SettingError(f"tasks={name}: lm-eval has no such task{close}; {remedy}")

    def load(self, name: str) -> dict[str, Any]:
        """Load a task, or the tasks of a group or tag, with their documents, for lm-eval's `evaluate`; once each.

        A collective: all ranks raise if one cannot load the task, or build its prompts.
        """
        if name in self._loaded:
            return self._loaded[name]
        with raise_on_all_ranks():
            try:
                loaded = dict(self._manager.load(name))
                for task in loaded["tasks"].values():
                    task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
                    task.set_fewshot_seed(SEED)
                    task.build_all_requests(limit=self._limit)
            except Exception as error:
                raise SettingError(
                    f"tasks={name}: lm-eval cannot load it ({describe(error)}); correct its YAML or documents; without "
                    "a network, name tasks with documents of your own by include_path"
                ) from error
        return self._loaded.setdefault(name, loaded)

    def evaluate(self, model: EvaluatedGPT, name: str, bootstrap_iters: int = 0) -> dict[str, Any]:
        """Return lm-eval's results; seeds the random generators. All ranks evaluate all documents.

        `bootstrap_iters` are the draws for standard errors without a formula, such as perplexity's; 0: no standard errors.
        """
        loaded = self.load(name)
        random.seed(0)  # for examples, generated texts and the bootstrap
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(SEED)
        try:
            results: dict[str, Any] = run_tasks(
                lm=model, task_dict=loaded, limit=self._limit, bootstrap_iters=bootstrap_iters, log_samples=False
            )
        except RuntimeError:  # of a forward pass, such as a lack of memory
            raise
        except Exception as error:
            raise RunError(
                f"task {name}: lm-eval cannot evaluate it ({describe(error)}); correct its YAML or documents"
            ) from error
        return results


def describe(error: BaseException) -> str:
    """Format an exception in one line; the type is left out for errors that are written for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
