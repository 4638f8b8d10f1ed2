"""`nlgmoe evaluate`: a checkpoint on lm-eval's tasks."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from nlgmoe.cli.classes import import_allowed
from nlgmoe.cli.device import check_device
from nlgmoe.cli.errors import UsageError
from nlgmoe.cli.output_files import check_output, write_whole

if TYPE_CHECKING:
    from nlgmoe.eval.loaded_model import LoadedModel

BOOTSTRAP_ITERS = 1000  # for standard errors without a formula: 2% of such an error


def evaluate(
    checkpoint: str,
    tasks: str = "lambada_openai,piqa,boolq,race,triviaqa,webqs",
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    data_dir: str | None = None,
    include_path: str | None = None,
    output: str | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    allow_code: list[str] | None = None,
) -> None:
    """Evaluate a checkpoint with lm-eval, and print every metric beside chance and the paper's models.

    Args:
        checkpoint: the folder, `NAME.ckpt`; of a run's folder, the newest valid one.
        tasks: names of lm-eval's tasks or groups, or YAML files of tasks, with commas between them.
        limit: documents of each task at most; below 1, that share of them.
        num_fewshot: examples before each document; by default what the task says, 0 for the paper's.
        batch_size: sequences read at a time.
        data_dir: folder with documents in TASK.jsonl (or .json, .parquet, .csv, .arrow), such as `nlgmoe prepare-eval` writes;
            what it lacks is fetched from the Hugging Face hub.
        include_path: folder with further tasks in lm-eval's YAML; one with the name of a built-in task replaces it.
        output: JSON file for lm-eval's results and what was evaluated.
        tokenizer: as `data.tokenizer`, for a checkpoint that holds none.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        precision: of weights and products; by default as the checkpoint has them.
        allow_code: a module with a router or an expert of the checkpoint, to be imported; may be given several times.

    Raises:
        ValueError: checkpoint, tokenizer, task or documents cannot be used; the message says what to do.
    """
    if limit is not None and not 0 < limit < math.inf:
        raise UsageError(f"limit={limit} must be above 0")
    if limit is not None and limit > 1 and limit != int(limit):
        raise UsageError(f"limit={limit} must be a whole number, or below 1 for a share of the documents")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    if output is not None:
        check_output(output)

    import_allowed(allow_code)
    from nlgmoe.device import default_device

    chosen = device or default_device()
    check_device(chosen)

    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT
    from nlgmoe.tools.lm_eval.paper import table
    from nlgmoe.tools.lm_eval.tasks import Tasks
    from nlgmoe.tools.lm_eval.zero_shot import evaluate_task, merge

    try:
        chosen_tasks = Tasks([name for name in tasks.split(",") if name], data_dir, include_path, num_fewshot)
    except ValueError as error:
        raise UsageError(str(error)) from error
    loaded = load_pretrained(checkpoint, tokenizer, chosen, precision)
    model = EvaluatedGPT(loaded.model, loaded.tokenizer, batch_size)
    for name in chosen_tasks.names:  # before hours are spent on the others
        chosen_tasks.load(name)
    parts = []
    for name in chosen_tasks.names:
        print(f"{name} ...", flush=True)
        parts.append(evaluate_task(model, chosen_tasks, name, limit, BOOTSTRAP_ITERS))
    results = merge(parts)
    about = _about(loaded, limit)
    print(f"\n{_headline(about)}\n\n{table(results)}")
    if output is not None:
        _write(output, results | {"nlgmoe": about})


def _about(loaded: LoadedModel, limit: float | None) -> dict[str, Any]:
    """What was evaluated."""
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


def _headline(about: dict[str, Any]) -> str:
    limited = "" if about["limit"] is None else f"; limit {about['limit']:g}: a part of each task"
    return (
        f"{about['checkpoint']}, step {about['step']:,}, {about['tokens']:,} tokens; {about['parameters']:,} parameters, "
        f"{about['active_parameters']:,} active for a token{limited}"
    )


def _write(output: str, results: dict[str, Any]) -> None:
    from nlgmoe.tools.lm_eval.lm_eval_model import handle_non_serializable

    text = json.dumps(_without_nan(results), indent=2, default=handle_non_serializable)
    write_whole(output, text + "\n")
    print(f"written to {output}")


def _without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
