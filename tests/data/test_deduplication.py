import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlgmoe.data.pocket import deduplication
from nlgmoe.data.pocket.build import open_corpus, text_path, write_corpus
from nlgmoe.data.pocket.deduplication import Document, cut, drop_duplicates, limit_bytes, normalise, split
from nlgmoe.data.pocket.extraction import clean_wiki_markup
from tests.data.conftest import make_documents


def paragraphs(*names: str) -> str:
    return "\n\n".join(f"{name} {'lorem ipsum ' * 20}{name}" for name in names)


def test_duplicates_go_and_the_first_copy_stays() -> None:
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


def test_small_domains_get_a_few_validation_documents_and_keep_some_to_train_on() -> None:
    assert len(split(make_documents(10, "prose", 5))["validation"]) == deduplication.MIN_VALIDATION_DOCUMENTS
    assert len(split(make_documents(2, "prose", 5))["train"]) == 1
    with pytest.raises(ValueError, match="at least two"):
        split(make_documents(1, "prose", 5))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab \n", min_size=1, max_size=2_000), min_size=1, max_size=3))
def test_cutting_loses_nothing_but_blank_lines(texts: list[str]) -> None:
    text = normalise("\n\n".join(text * (1 + 60_000 // len(text)) for text in texts))
    sections = cut(Document(text, "prose", "book"))
    assert "".join(section.text.replace("\n", "") for section in sections) == text.replace("\n", "")
    if "\n\n" not in text:
        assert len(sections) == 1


def test_sections_have_about_one_size() -> None:
    book = Document("\n\n".join(f"paragraph {i} " * 20 for i in range(1000)), "prose", "book")
    sizes = [section.num_bytes for section in cut(book)]
    assert len(sizes) > 10 and min(sizes) > 10_000 and max(sizes) < 25_000


def test_limit_samples_and_keeps_the_order() -> None:
    documents = make_documents(50, "prose", 5)
    chosen = limit_bytes(documents, 10_000)
    assert 8_000 < sum(d.num_bytes for d in chosen) <= 10_000
    assert chosen == [d for d in documents if d in chosen] and chosen != documents[: len(chosen)]


def test_a_limit_is_of_one_domain_of_one_archive(tmp_path: Path) -> None:
    kinds = (("prose", "a"), ("prose", "b"), ("verse", "a"))
    documents = [
        replace(document, domain=domain, source=f"{archive}:{index}")
        for seed, (domain, archive) in enumerate(kinds)
        for index, document in enumerate(make_documents(30, "prose", seed))
    ]
    write_corpus(tmp_path, "tiny", documents, {}, {("prose", "a"): 6_000})
    lines = [json.loads(line) for file in (tmp_path / "text").iterdir() for line in file.read_text().splitlines()]
    kept = {kind: [one for one in lines if (one["domain"], one["source"][0]) == kind] for kind in kinds}
    assert 4_000 < sum(len(one["text"].encode()) for one in kept["prose", "a"]) <= 6_000
    assert len(kept["prose", "b"]) == len(kept["verse", "a"]) == 30


def test_corpus_is_reproducible_verified_and_never_half_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = make_documents(30, "prose", 1) + make_documents(20, "verse", 2)
    first = write_corpus(tmp_path, "tiny", documents, {})
    assert write_corpus(tmp_path / "again", "tiny", documents, {}) == first == open_corpus(tmp_path)
    line = json.loads(text_path(tmp_path, "verse.train").read_text(encoding="utf-8").splitlines()[0])
    assert set(line) == {"text", "domain", "source"} and line["domain"] == "verse"

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nlgmoe.data.pocket.build._write_jsonl", full_disk)
        with pytest.raises(OSError):
            write_corpus(tmp_path, "tiny", documents[:40], {})
    assert open_corpus(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "manifest.json", "text"]

    with text_path(tmp_path, "verse.train").open("a") as handle:
        handle.write("\n")
    with pytest.raises(ValueError, match=r"verse\.train\.jsonl should have sha256"):
        open_corpus(tmp_path)


def test_wiki_markup() -> None:
    markup = (
        "{{Infobox|a={{b|c}}}}'''Ada''' ({{lang|fr|[[Ada|Ada la]]}}; born {{convert|5|km|mi}}<ref name=x>no</ref>)"
        " likes [[mathematics|maths]], [[poetry]] and [http://x.org sites].<ref name=x/>\n"
        "{|\n| table || {{x}}\n|}\n[[File:a.jpg|thumb|A [[link]] in a [[caption|b]].]]\n"
        "== Life ==\n* one &amp; two\n=== Notes ===\nKept.\n== See also ==\n* [[Dropped]]\n[[Category:X]]"
    )
    assert clean_wiki_markup(markup) == (
        "Ada (Ada la; born 5 km) likes maths, poetry and sites.\n\nLife\n\n- one & two\n\nNotes\n\nKept."
    )
