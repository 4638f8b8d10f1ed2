"""`nlgmoe evaluate`: evaluation of a checkpoint on lm-eval's tasks."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from nlgmoe.cli.model_options import check_device, import_allowed
from nlgmoe.cli.output_files import check_output, write_whole
from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from nlgmoe.eval.loaded_model import LoadedModel

BOOTSTRAP_ITERS = 1000  # for standard errors without a formula; their relative error is then about 2%


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
    """Evaluate a checkpoint with lm-eval, and print every metric with the chance level and the paper's values.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is evaluated.
        tasks: names of lm-eval's tasks or groups, or YAML files of tasks, separated by commas.
        limit: maximum number of documents per task; below 1, a fraction of them.
        num_fewshot: examples before each document; default: the task's setting, which is 0 for the paper's tasks.
        batch_size: sequences per batch.
        data_dir: folder with documents in TASK.jsonl (or .json, .parquet, .csv, .arrow), as `nlgmoe prepare-eval` writes them;
            other tasks are downloaded from the Hugging Face hub.
        include_path: folder with further tasks in lm-eval's YAML; a task with the name of a built-in one replaces it.
        output: new JSON file for lm-eval's results and a description of the model.
        tokenizer: as `data.tokenizer`, for a checkpoint without a tokenizer.
        device: cpu, cuda or cuda:N; default: a GPU if there is one.
        precision: precision of weights and matrix products; default: the checkpoint's.
        allow_code: module of the checkpoint's router or expert to import; may be given several times.
    """
    if limit is not None and not 0 < limit < math.inf:
        raise SettingError(f"limit={limit} must be above 0")
    if limit is not None and limit > 1 and limit != int(limit):
        raise SettingError(f"limit={limit} must be a whole number, or below 1 for a share of the documents")
    if batch_size < 1:
        raise SettingError(f"batch_size={batch_size} must be at least 1")
    if output is not None:
        check_output(output)

    import_allowed(allow_code)
    from nlgmoe.device import default_device

    device = device or default_device()
    check_device(device)

    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT, handle_non_serializable
    from nlgmoe.tools.lm_eval.paper import results_table
    from nlgmoe.tools.lm_eval.tasks import Tasks
    from nlgmoe.tools.lm_eval.zero_shot import evaluate_task, merge_results

    try:
        selected = Tasks([name for name in tasks.split(",") if name], data_dir, include_path, num_fewshot)
    except ValueError as error:
        raise SettingError(str(error)) from error
    loaded = load_pretrained(checkpoint, tokenizer, device, precision)
    model = EvaluatedGPT(loaded.model, loaded.tokenizer, batch_size)
    for name in selected.names:  # fail before any task is evaluated
        selected.load(name)
    parts = []
    for name in selected.names:
        print(f"{name} ...", flush=True)
        parts.append(evaluate_task(model, selected, name, limit, BOOTSTRAP_ITERS))
    results = merge_results(parts)
    about = _describe_model(loaded, limit)
    limited = "" if limit is None else f"; limit {limit:g}: a part of each task"
    print(
        f"\n{about['checkpoint']}, step {about['step']:,}, {about['tokens']:,} tokens; {about['parameters']:,} parameters, "
        f"{about['active_parameters']:,} active for a token{limited}\n\n{results_table(results)}"
    )
    if output is not None:
        document = _without_nan(results | {"nlgmoe": about})
        write_whole(output, json.dumps(document, indent=2, default=handle_non_serializable) + "\n")
        print(f"written to {output}")


def _describe_model(loaded: LoadedModel, limit: float | None) -> dict[str, Any]:
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
