"""Documents of files: each once, from any place, and nothing unusable in silence."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HTTPError

from nlgmoe.data import documents
from nlgmoe.data.documents import Fields, Record, read_documents
from nlgmoe.data.source_files import has_records, input_files, is_plain_text
from nlgmoe.validation import RunError
from tests.support.documents import write_bytes, write_records

ENDINGS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
PILE = Fields(domain="meta.pile_set_name")
TEXTS = [f"document {i}: naïve 日本\n" + "words " * (i % 7) for i in range(300)]


def records_of(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "meta": {"pile_set_name": f"set {i % 3}"}} for i, text in enumerate(texts)]


def write_lines(path: Path, lines: list[bytes]) -> Path:
    return write_bytes(path, b"".join(line + b"\n" for line in lines))


def read(path: str | Path, fields: Fields = PILE, **options: Any) -> list[Record]:
    return list(read_documents(path, fields, **options))


@pytest.mark.parametrize("ending", ENDINGS)
def test_documents_are_read_once_from_any_place_in_any_share(tmp_path: Path, ending: str) -> None:
    path = write_records(tmp_path / f"data.{ending}", records_of(TEXTS))
    records = read(path)
    assert [(r.number, r.content, r.domain) for r in records] == [
        (i, text, f"set {i % 3}") for i, text in enumerate(TEXTS)
    ]
    shares = [read(path, shard=range(index, sys.maxsize, 4)) for index in range(4)]
    assert sorted((r for share in shares for r in share), key=lambda r: r.number) == records
    for first in (0, 1, 6, 7, 298, 299):
        assert read(path, start=first + 1) == records[first + 1 :]
        assert read(path, shard=range(2, sys.maxsize, 4), start=first + 1) == [r for r in shares[2] if r.number > first]


GOOD = b'{"text": "good"}'
BAD_LINES = [
    (b'{"text": "\xff"}', "not UTF-8", "from byte 10 on"),
    (b'{"text": "cut o', "not JSON", "Unterminated string"),
    (b"[", "not JSON", "one document a line, as `jq -c .[]` writes an array"),
    (b'[{"text": "good"}]', "no JSON object", "one document a line"),
    (b'{"content": "good"}', "no such field", "(text)"),
    (b'{"text": ["good"]}', "not text", "text is of type list"),
    (b'{"text": "' + b"x" * 200_000 + b'"}', "document too long", "200,012 bytes; at most 150,000 are allowed"),
]


@pytest.mark.parametrize(("line", "kind", "details"), BAD_LINES)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: bytes, kind: str, details: str) -> None:
    fields = Fields(max_bytes=150_000)
    path = write_lines(tmp_path / "data.jsonl.zst", [GOOD, line, GOOD, line])
    with pytest.raises(RunError) as error:
        read(path, fields)
    assert str(error.value).startswith(f"{path}, line 2: {kind}") and details in str(error.value)
    assert str(error.value).endswith("; repair it, or leave it out with nlgmoe prepare-data --on-bad-data skip")
    skipped: list[str] = []
    assert [record.number for record in read(path, fields, skip=skipped.append)] == [0, 2]
    assert [line.partition(" (")[0] for line in skipped] == [f"{path}, line {number}: {kind}" for number in (2, 4)]


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_damaged_file_is_named_or_skipped(tmp_path: Path, ending: str) -> None:
    path = write_records(
        tmp_path / f"data.{ending}", records_of([text + str(i) * 2000 for i, text in enumerate(TEXTS)])
    )
    whole = read(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 4 // 5])
    with pytest.raises(RunError, match=rf"data\.{ending}, after document \d+: damaged or cut off \("):
        read(path)
    skipped: list[str] = []
    records = read(path, skip=skipped.append)
    assert records == whole[: len(records)] and len(skipped) == 1
    if ending != "parquet":  # its index is at its end
        assert 100 < len(records) < 300
        for start in (1, 77, len(records)):  # it ends where it ended, wherever reading began
            assert read(path, start=start, skip=skipped.append) == records[start:]
    path.write_bytes(b"no such format" * 1000)
    with pytest.raises(RunError, match="damaged or cut off"):
        read(path)


def test_bad_rows_of_parquet_are_named_or_skipped(tmp_path: Path) -> None:
    texts = [b"good", b"\xff", None, b"long" * 10, b"good"]
    column = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path := tmp_path / "data.parquet")
    skipped: list[str] = []
    records = read(path, Fields(domain="meta.name", max_bytes=30), skip=skipped.append)
    assert [(r.number, r.content, r.domain) for r in records] == [(0, "good", None), (4, "good", None)]
    reasons = {2: "not UTF-8", 4: "document too long (40 bytes; at most 30 are allowed)"}  # null is an empty text
    assert skipped == [f"{path}, row {row}: {reason}" for row, reason in reasons.items()]
    with pytest.raises(RunError, match=r"data\.parquet: no such column \(body; there are text\)"):
        read(path, Fields("body"))


def test_a_text_that_is_null_is_an_empty_one(tmp_path: Path) -> None:
    records = [b'{"meta": null}', b'{"meta": {"text": null}}', b'{"meta": {"text": "good"}}']
    path = write_lines(tmp_path / "data.jsonl", records)
    assert [record.content for record in read(path, Fields("meta.text"))] == ["good"]


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), HTTPError("connection reset")])
def test_failing_disk_or_network_is_no_bad_data(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the reading even where bad data is left out: a retry may succeed."""

    def fail(*args: Any) -> Iterator[tuple[int, int, Any]]:
        yield 0, 4, lambda: ("good", None)
        raise failure

    path = write_records(tmp_path / "data.jsonl", records_of(TEXTS[:3]))
    monkeypatch.setattr(documents, "_read_lines", fail)
    with pytest.raises(ValueError, match=rf"data\.jsonl, after document 1: cannot be read \(.*{failure.args[-1]}\)"):
        read(path, skip=print)


@pytest.mark.parametrize(("ending", "mark", "first"), [("txt", "\ufeff", "naïve\n"), ("md.gz", "", "\n" * 40)])
def test_plain_text_is_one_document_or_cut_at_ends_of_lines(tmp_path: Path, ending: str, mark: str, first: str) -> None:
    """Cutting loses nothing, and makes no blank document."""
    text = first + "".join(f"\ufeffline {i}\n" + "\n" * (i % 30) for i in range(60)) + "\n" * 90
    path = write_lines(tmp_path / f"data.{ending}", [(mark + text).encode().removesuffix(b"\n")])
    assert is_plain_text(path) and not has_records(path)
    (whole,) = read(path)
    assert whole.content == text and read(path, start=1) == []
    cut = Fields(text_bytes=20)
    pieces = read(path, cut)
    assert len(pieces) > 5 and "".join(str(piece.content) for piece in pieces) == text
    assert all(str(piece.content).endswith("\n") and str(piece.content).strip() for piece in pieces)
    assert read(path, cut, start=3) == pieces[3:]


def test_a_document_without_text_is_left_out_and_counted(tmp_path: Path) -> None:
    """In every reader, from any place and in any share; it keeps its number."""
    records: list[dict[str, Any]] = [{"text": text} for text in ("good", "", " \n\t\u00a0", "good", "\u2003", " ")]
    lines = [GOOD, b"", b" \t\r", GOOD, b'{"text": ""}', b""]
    paths = [write_records(tmp_path / "data.parquet", records), write_lines(tmp_path / "lines.jsonl", lines)]
    for path in paths:
        for share, start, numbers, empty in ((documents.WHOLE, 2, [3], 3), (range(1, sys.maxsize, 2), 0, [3], 2)):
            counted: list[None] = []
            found = read(path, shard=share, start=start, count_empty=lambda counted=counted: counted.append(None))
            assert [record.number for record in found] == numbers and len(counted) == empty, path
    (path := tmp_path / "blank.txt").write_bytes(b"\xef\xbb\xbf \n \n")
    for fields in (PILE, Fields(text_bytes=2)):
        counted = []
        assert read(path, fields, count_empty=lambda counted=counted: counted.append(None)) == []
        assert len(counted) == 1


def test_text_file_has_its_open_last_line_and_no_byte_order_mark(tmp_path: Path) -> None:
    (path := tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD)
    assert [record.content for record in read(path)] == ["good", "good"]
    latin, wide = "naïve".encode("latin-1"), "naïve".encode("utf-16")
    for content, reason in ((latin, r"not UTF-8 \(from byte 2 on; convert"), (wide, r"not text \(it has zero bytes")):
        (path := tmp_path / "other.txt").write_bytes(content)
        with pytest.raises(RunError, match=rf"other\.txt: {reason}"):
            read(path)


def test_folder_of_text_gives_its_records_else_plain_text_and_names_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("README.md", "b.txt.gz", ".hidden", "._a.jsonl"):
        (tmp_path / name).touch()
    assert input_files(str(tmp_path)) == [str(tmp_path / "README.md"), str(tmp_path / "b.txt.gz")]
    assert not capsys.readouterr().err
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.bz2"):
        (tmp_path / name).touch()
    assert input_files(str(tmp_path)) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]
    note = capsys.readouterr().err
    assert "note: 3 entries of" in note and "unknown endings, or plain text beside records; to read more, add" in note
    (tmp_path / "inside" / "deep").mkdir(parents=True)
    (tmp_path / "inside" / "deep" / "d.txt").touch()
    with pytest.raises(ValueError, match=r"inside is a folder without text files of its own.*inside/\*\*/\*\.txt'"):
        input_files(str(tmp_path / "inside"))
    assert input_files(f"{tmp_path}/*.md") == [str(tmp_path / "README.md")]
