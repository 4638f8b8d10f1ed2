"""`nlgmoe evaluate`: evaluation of a checkpoint on lm-eval's tasks."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal

from nlgmoe.cli.arguments import check_device, check_output, import_allowed, write_whole
from nlgmoe.validation import require_at_least

BOOTSTRAP_ITERS = 1000  # for standard errors without a formula; their relative error is then about 2%


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
    """Evaluate a checkpoint with lm-eval, and print its table of metrics.

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
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.tools.lm_eval.harness import EvaluatedGPT, Tasks, handle_non_serializable, make_table, quiet
    from nlgmoe.versions import versions

    device = device or default_device()
    check_device(device)
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    changes: dict[str, Any] = {"without": without or (), "removal": removal, "experts_per_token": experts_per_token}
    with quiet(progress=True):
        selected = Tasks(names, include_path, limit)
        loaded = load_pretrained(checkpoint, tokenizer, device, precision, **changes)
        model = EvaluatedGPT(loaded.model, loaded.tokenizer, batch_size)
        for name in names:  # all before the first is evaluated, so that mistakes show at once
            selected.load(name)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap must not fork a process with threads
        results: dict[str, Any] = {}  # in lm-eval's form for several tasks
        for name in names:
            for key, value in selected.evaluate(model, name, BOOTSTRAP_ITERS).items():
                results.setdefault(key, {}).update(value)
    count, document = count_parameters(loaded.model.config), loaded.document
    about = {"checkpoint": str(loaded.path), "step": document["global_step"], "tokens": document["tokens_seen"]}
    about |= {"parameters": count.total, "active_parameters": count.active, "limit": limit}
    about |= {"versions": versions() | {"lm_eval": version("lm_eval")}} | (changes if without else {})
    limited = "" if limit is None else f"; limit {limit}: a part of each task"
    limited += f"; without experts {' '.join(without)} ({removal})" if without else ""
    print(
        f"\n{about['checkpoint']}, step {about['step']:,}, {about['tokens']:,} tokens; {about['parameters']:,} parameters, "
        f"{about['active_parameters']:,} active for a token{limited}\n\n{make_table(results)}"
    )
    if output is not None:
        text = json.dumps(results | {"nlgmoe": about}, default=handle_non_serializable)
        document = json.loads(text, parse_constant=lambda name: None)  # NaN and infinity, which JSON lacks
        write_whole(output, json.dumps(document, indent=2) + "\n")
        print(f"written to {output}")
