import json
from dataclasses import replace
from pathlib import Path

import pytest

from nlgmoe.data import pocket_documents as deduplication
from nlgmoe.data.pocket_build import open_corpus, text_path, write_corpus
from nlgmoe.data.pocket_documents import Document, drop_duplicates, split
from tests.support.corpora import make_documents


def paragraphs(*names: str) -> str:
    return "\n\n".join(f"{name} {'lorem ipsum ' * 20}{name}" for name in names)


def test_deduplication_keeps_the_first_copy() -> None:
    original = Document(paragraphs("a", "b", "c"), "prose", "1")
    kept = drop_duplicates(
        [
            original,
            Document(original.text.upper().replace(" ", "  "), "verse", "equal up to case and blanks, other domain"),
            Document(paragraphs("c", "x", "a"), "prose", "two thirds seen"),
            Document(paragraphs("b", "y", "z"), "prose", "one third seen"),
            Document(paragraphs("d", "d", "d"), "prose", "repeats itself only"),
            Document("short", "prose", "too short"),
        ]
    )
    assert [document.source for document in kept] == ["1", "one third seen", "repeats itself only"]


def test_split_is_by_group_disjoint_and_independent_of_order() -> None:
    documents = make_documents(200, "prose", 5)
    documents = [replace(d, group=f"work {i // 4}") for i, d in enumerate(documents)]
    parts = split(documents)
    groups = {name: {document.group for document in part} for name, part in parts.items()}
    assert not groups["train"] & groups["validation"]
    assert sorted(d.source for part in parts.values() for d in part) == sorted(d.source for d in documents)
    size = {name: sum(d.num_bytes for d in part) for name, part in parts.items()}
    assert 0.02 < size["validation"] / sum(size.values()) <= deduplication.VALIDATION_SHARE
    assert split(documents[::-1]) == parts
    assert len(split(make_documents(10, "prose", 5))["validation"]) == deduplication.MIN_VALIDATION_DOCUMENTS
    assert len(split(make_documents(2, "prose", 5))["train"]) == 1


def test_corpus_is_reproducible_verified_and_never_half_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = make_documents(30, "prose", 1) + make_documents(20, "verse", 2)
    first = write_corpus(tmp_path, "tiny", documents, {})
    assert write_corpus(tmp_path / "again", "tiny", documents, {}) == first == open_corpus(tmp_path)
    line = json.loads(text_path(tmp_path, "verse.train").read_text(encoding="utf-8").splitlines()[0])
    assert set(line) == {"text", "domain", "source"} and line["domain"] == "verse"

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nlgmoe.data.pocket_build._write_jsonl", full_disk)
        with pytest.raises(OSError):
            write_corpus(tmp_path, "tiny", documents[:40], {})
    assert open_corpus(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "manifest.json", "text"]

    with text_path(tmp_path, "verse.train").open("a") as handle:
        handle.write("\n")
    with pytest.raises(ValueError, match=r"verse\.train\.jsonl should have sha256"):
        open_corpus(tmp_path)
