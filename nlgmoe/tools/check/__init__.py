"""`nlgmoe check`: properties that any MoE layer must have, of this project or of a user's."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict

from nlgmoe.cli.arguments import import_allowed
from nlgmoe.validation import RunError


def check(target: list[str], allow_code: list[str] | None = None, json: bool = False) -> None:
    """Test a MoE layer: gradients, capacity, padding, ranks, state, types. 10 to 60 seconds on a CPU.

    Args:
        target: YAML files of train.py; a checkpoint or run folder; a class_path of a RouterConfig or
            ExpertConfig, or of a whole MoE layer.
        allow_code: module of the checkpoint's router, expert or attention to import; may be given several times.
        json: print one JSON object instead of a table.
    """
    import_allowed(allow_code)
    from nlgmoe.tools.check.properties import check_layer  # these need torch
    from nlgmoe.tools.check.targets import find_layers

    tables, failed, total = [], 0, 0
    for layer in find_layers(target):
        if not json:
            print(f"{layer.name}: {layer.sizes}")
        results = []
        for result in check_layer(layer):
            results.append(result)
            if not json:
                print(f"  {result.verdict:<16}{result.property:<42}{result.reason}", flush=True)
        tables.append({"layer": layer.name, "results": [asdict(result) for result in results]})
        failed += sum(result.verdict == "fail" for result in results)
        total += len(results)
    if json:
        print(json_format.dumps({"target": target, "failed": failed, "layers": tables}, indent=2))
    if failed:
        raise RunError(f"{failed} of {total} properties fail; docs/extending.md explains each")
