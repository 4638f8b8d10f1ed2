"""`nlgmoe evaluate`: evaluation of a checkpoint on lm-eval's tasks."""

from __future__ import annotations

import json
import math
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from nlgmoe.cli.arguments import check_device, check_output, import_allowed, write_whole
from nlgmoe.validation import require

if TYPE_CHECKING:
    from nlgmoe.eval.loaded_model import LoadedModel

BOOTSTRAP_ITERS = 1000  # for standard errors without a formula; their relative error is then about 2%


def evaluate(
    checkpoint: str,
    tasks: str = "lambada_openai,piqa,boolq,race,triviaqa,webqs",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    include_path: str | None = None,
    output: str | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    allow_code: list[str] | None = None,
) -> None:
    """Evaluate a checkpoint with lm-eval, and print every metric with the chance level and the paper's values.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is evaluated.
        tasks: names of lm-eval's tasks, groups or tags, separated by commas.
        limit: maximum number of documents per task.
        num_fewshot: examples before each document; default: the task's setting, which is 0 for the paper's tasks.
        batch_size: sequences per batch.
        include_path: folder with tasks in lm-eval's YAML, as `nlgmoe prepare-eval` writes them; a task with the name of a
            built-in one replaces it. The documents of other tasks are downloaded from the Hugging Face hub.
        output: new JSON file for lm-eval's results and a description of the model.
        tokenizer: as `data.tokenizer`, for a checkpoint without a tokenizer.
        device: cpu, cuda or cuda:N; default: a GPU if there is one.
        precision: precision of weights and matrix products; default: the checkpoint's.
        allow_code: module of the checkpoint's router, expert or attention to import; may be given several times.
    """
    check_settings(limit, num_fewshot, batch_size)
    if output is not None:
        check_output(output)
    import_allowed(allow_code)
    from nlgmoe.device import default_device
    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT, handle_non_serializable, quiet
    from nlgmoe.tools.lm_eval.results import merge_results, results_table
    from nlgmoe.tools.lm_eval.tasks import Tasks

    device = device or default_device()
    check_device(device)
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    with quiet(progress=True):
        selected = Tasks(names, include_path, limit, num_fewshot)
        loaded = load_pretrained(checkpoint, tokenizer, device, precision)
        model = EvaluatedGPT(loaded.model, loaded.tokenizer, batch_size)
        for name in names:  # all before the first is evaluated, so that mistakes show at once
            selected.load(name)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap must not fork a process with threads
        results = merge_results([selected.evaluate(model, name, BOOTSTRAP_ITERS) for name in names])
    about = _describe_model(loaded, limit)
    limited = "" if limit is None else f"; limit {limit}: a part of each task"
    print(
        f"\n{about['checkpoint']}, step {about['step']:,}, {about['tokens']:,} tokens; {about['parameters']:,} parameters, "
        f"{about['active_parameters']:,} active for a token{limited}\n\n{results_table(results)}"
    )
    if output is not None:
        document = _without_nan(results | {"nlgmoe": about})
        write_whole(output, json.dumps(document, indent=2, default=handle_non_serializable) + "\n")
        print(f"written to {output}")


def check_settings(
    limit: int | None, num_fewshot: int | None, batch_size: int, every_n_steps: int | None = None
) -> None:
    """Check numbers that `nlgmoe evaluate` and `ZeroShotEval` take; None means their default."""
    counts = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size, "every_n_steps": every_n_steps}
    for name, value in counts.items():
        least = 0 if name == "num_fewshot" else 1
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(value is None or (whole and value >= least), f"{name}={value} must be a whole number from {least}")


def _describe_model(loaded: LoadedModel, limit: int | None) -> dict[str, Any]:
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.versions import versions

    count = count_parameters(loaded.model.config)
    return {
        "checkpoint": str(loaded.path),
        "step": loaded.document["global_step"],
        "tokens": loaded.document["tokens_seen"],
        "parameters": count.total,
        "active_parameters": count.active,
        "model_config": loaded.model.config.to_dict(),
        "tokenizer": loaded.tokenizer.fingerprint,
        "precision": str(loaded.model.unembedding.dtype).removeprefix("torch."),
        "device": str(loaded.model.unembedding.device),
        "limit": limit,
        "versions": versions() | {"lm_eval": version("lm_eval")},
    }


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
