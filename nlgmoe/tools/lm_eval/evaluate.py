"""`nlgmoe evaluate`: evaluation of a checkpoint on lm-eval's tasks, and a table that compares it with chance and the paper.

Source of the paper's accuracies: tables 2 and 5 of DeepSpeed-MoE (arXiv 2201.05596), percent.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from nlgmoe.cli.arguments import check_device, check_output, import_allowed, write_whole
from nlgmoe.validation import require_at_least

if TYPE_CHECKING:
    from nlgmoe.eval.loaded_model import LoadedModel

BOOTSTRAP_ITERS = 1000  # for standard errors without a formula; their relative error is then about 2%
Results = dict[str, Any]
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em")

TASKS = ("lambada_openai", "piqa", "boolq", "race", "triviaqa", "webqs")  # the paper's columns, under lm-eval's names
METRIC = {"triviaqa": "exact_match", "webqs": "exact_match"}  # other tasks: acc
ROWS: dict[str, tuple[float, ...]] = {
    "350M dense": (52.03, 69.31, 53.64, 31.77, 3.21, 1.57),
    "350M+MoE-128": (62.70, 74.59, 60.46, 35.60, 16.58, 5.17),
    "350M+PR-MoE-32/64": (63.65, 73.99, 59.88, 35.69, 16.30, 4.73),
    "350M+PR-MoE+MoS": (63.46, 73.34, 58.07, 34.83, 13.69, 5.22),
    "1.3B dense": (63.65, 73.39, 63.39, 35.60, 10.05, 3.25),
    "1.3B+MoE-128": (69.84, 76.71, 64.92, 38.09, 31.29, 7.19),
    "1.3B+PR-MoE-64/128": (70.60, 77.75, 67.16, 38.09, 28.86, 7.73),
    "1.3B+PR-MoE+MoS": (70.17, 77.69, 65.66, 36.94, 29.05, 8.22),
}
_COLUMNS = 2 * (("dense", 6), ("MoE", 6), ("PR-MoE", 7), ("MoS", 6))  # names and widths, for two sizes


def evaluate(
    checkpoint: str,
    tasks: str = "lambada_openai,piqa,boolq,race,triviaqa,webqs",
    limit: int | None = None,
    batch_size: int = 16,
    include_path: str | None = None,
    output: str | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    without: list[str] | None = None,
    removal: Literal["route_around", "contribution"] = "route_around",
    experts_per_token: int | None = None,
    allow_code: list[str] | None = None,
) -> None:
    """Evaluate a checkpoint with lm-eval, and print every metric with the chance level and the paper's values.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is evaluated.
        tasks: names of lm-eval's tasks, groups or tags, separated by commas.
        limit: maximum number of documents per task.
        batch_size: sequences per batch.
        include_path: folder with tasks in lm-eval's YAML; a task with the name of a built-in one replaces it. The documents of
            other tasks are downloaded from the Hugging Face hub.
        output: new JSON file for lm-eval's results and a description of the model.
        tokenizer: as `data.tokenizer`, for a checkpoint without a tokenizer.
        device: cpu, cuda or cuda:N; default: a GPU if there is one.
        precision: precision of weights and matrix products; default: the checkpoint's.
        without: experts to remove, LAYER:EXPERT,EXPERT such as 0:3,7 (MoE layers and experts are counted from 0); may be given
            several times.
        removal: route_around: other experts take their tokens, as in a pruned model; contribution: their output is 0.
        experts_per_token: in place of the model's model.config.moe.top_k.
        allow_code: module of the checkpoint's router, expert or attention to import; may be given several times.
    """
    require_at_least(1, SimpleNamespace(limit=limit, batch_size=batch_size), "limit", "batch_size")
    if output is not None:
        check_output(output)
    import_allowed(allow_code)
    from nlgmoe.device import default_device
    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.tools.lm_eval.harness import EvaluatedGPT, Tasks, handle_non_serializable, quiet

    device = device or default_device()
    check_device(device)
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    changes: Results = {"without": without or (), "removal": removal, "experts_per_token": experts_per_token}
    with quiet(progress=True):
        selected = Tasks(names, include_path, limit)
        loaded = load_pretrained(checkpoint, tokenizer, device, precision, **changes)
        model = EvaluatedGPT(loaded.model, loaded.tokenizer, batch_size)
        for name in names:  # all before the first is evaluated, so that mistakes show at once
            selected.load(name)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap must not fork a process with threads
        results: Results = {}  # in lm-eval's form for several tasks
        for name in names:
            for key, value in selected.evaluate(model, name, BOOTSTRAP_ITERS).items():
                results.setdefault(key, {}).update(value)
    about = _describe_model(loaded, limit) | (changes if without else {})
    limited = "" if limit is None else f"; limit {limit}: a part of each task"
    limited += f"; without experts {' '.join(without)} ({removal})" if without else ""
    print(
        f"\n{about['checkpoint']}, step {about['step']:,}, {about['tokens']:,} tokens; {about['parameters']:,} parameters, "
        f"{about['active_parameters']:,} active for a token{limited}\n\n{results_table(results)}"
    )
    if output is not None:
        text = json.dumps(results | {"nlgmoe": about}, default=handle_non_serializable)
        document = json.loads(text, parse_constant=lambda name: None)  # NaN and infinity, which JSON lacks
        write_whole(output, json.dumps(document, indent=2) + "\n")
        print(f"written to {output}")


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


def results_table(results: Results) -> str:
    """Format every metric with its standard error, the chance level and the paper's values; fractions in percent."""
    lines = [
        f"{'':<38}{'this model':>20} {'by chance':>9} {'paper, 350M':>28} {'paper, 1.3B':>28}".rstrip(),
        f"{'task':<26}{'metric':<12}{'value':>11} {'stderr':>8} {'':>9}"
        + "".join(f" {name:>{width}}" for name, width in _COLUMNS),
    ]
    for task, metric, value, error in metrics(results):
        name = metric.partition("/")[0]
        unit = 100 if name in ACCURACIES or name == "f1" else 1
        guess = results["chance"].get(task, {}).get("guess") if name in ACCURACIES else None
        if name == "exact_match":
            guess = 0.0  # lists of answers too: an answer has to be generated word for word
        stderr = "-" if error is None else f"{unit * error:.3g}"
        line = f"{task:<26}{metric:<12}{unit * value:>11.4g} {stderr:>8} {'' if guess is None else f'{100 * guess:.1f}':>9}"
        if task in TASKS and metric == METRIC.get(task, "acc"):
            for values, (_, width) in zip(ROWS.values(), _COLUMNS, strict=True):
                line += f" {values[TASKS.index(task)]:>{width}.2f}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def metrics(results: Results) -> Iterator[tuple[str, str, float, float | None]]:
    """Yield task (or group), metric, value and standard error (None: unknown) of each metric.

    If a task has several of lm-eval's filters, the name is METRIC/FILTER.
    """
    for task, values in results["results"].items():
        keys = [key.split(",") for key, value in values.items() if "," in key and isinstance(value, int | float)]
        names = Counter(metric for metric, _ in keys)
        for metric, name in keys:
            if not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{name}")
                full_name = f"{metric}/{name}" if names[metric] > 1 else metric
                yield task, full_name, float(values[f"{metric},{name}"]), error if isinstance(error, float) else None
