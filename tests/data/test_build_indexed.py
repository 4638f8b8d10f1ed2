"""A corpus of the user's text: the same bytes however many threads made it, however often it was killed before."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xxhash
import zstandard
from filelock import FileLock

from nlgmoe.commands import prepare_data
from nlgmoe.commands.main import main
from nlgmoe.data import IndexedDataset, IndexedWriter, Tokenizer, build_indexed
from nlgmoe.data.documents import Fields, Record
from nlgmoe.data.prefix import Sidecar
from nlgmoe.data.source_files import input_files
from nlgmoe.data.streams import StreamConfig
from nlgmoe.experiment import load_config
from nlgmoe.validation import RunError
from tests.data.oracles import Content, MegatronDataset, content
from tests.support.documents import lines, write_bytes, write_records

build: Any = build_indexed.build_indexed


def skip(line: str) -> None:
    """Leave out bad data without a word."""


TEXTS = [f"document {number}: naïve 日本 <|endoftext|>\n" + "reading books " * (number % 9) for number in range(90)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_indexed, "CHUNK_CHARACTERS", 300)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three kinds; between the documents, lines that are none."""
    folder = tmp_path / "text"
    paths = [
        write_bytes(folder / "a.jsonl", lines(TEXTS[:10]) + b"no JSON\n" + lines(TEXTS[10:30])),
        write_bytes(folder / "b.jsonl.zst", b'{"other": 1}\n' + lines(TEXTS[30:60]) + b"neither\n"),
        write_records(folder / "c.parquet", [{"text": text} for text in [*TEXTS[60:], None]]),
    ]
    return [str(path) for path in paths]


SKIPPED = 3  # the null of c.parquet is an empty text


@pytest.fixture
def wanted(tokenizer: Tokenizer, tmp_path: Path) -> Content:
    """Of one process that has all documents at once: those held out come last."""
    with IndexedWriter(tmp_path / "wanted", np.dtype(np.uint16)) as writer:
        for text in sorted(TEXTS, key=is_held_out):
            writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
    return content(tmp_path / "wanted")


def is_held_out(text: str) -> bool:
    return xxhash.xxh3_64_intdigest(text.encode()) < 0.1 * 2**64


@pytest.mark.parametrize("workers", [1, 3])
def test_build_does_not_depend_on_the_threads(
    tokenizer: Tokenizer, files: list[str], wanted: Content, tmp_path: Path, workers: int
) -> None:
    reported: list[Any] = []
    done = build(files, tmp_path / "new" / "pile", tokenizer, Fields(), workers, reported.append, skip)
    assert content(tmp_path / "new" / "pile") == wanted
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["pile.bin", "pile.idx", "pile.json"]
    sidecar = Sidecar.read(tmp_path / "new" / "pile")
    assert sidecar is not None and (sidecar.documents, sidecar.held_out) == (90, done.held_out)
    assert (sidecar.tokens, sidecar.bytes, sidecar.domain) == (done.tokens, done.bytes, "pile")
    assert (done.documents, done.bytes) == (90, sum(len(text.encode()) for text in TEXTS))
    assert (2 * done.tokens, done.skipped) == (len(wanted[0]), SKIPPED)
    assert len(reported) > 10 and reported[-1] == done
    theirs = MegatronDataset(str(tmp_path / "new" / "pile"))
    texts = [tokenizer.decode(theirs[i][:-1]) for i in range(len(theirs))]
    assert texts == sorted(TEXTS, key=is_held_out) and 0 < done.held_out == sum(map(is_held_out, TEXTS)) < 20


def test_a_text_that_ends_a_document_itself_gets_no_second_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As a stream reads it: if special tokens are read, a text may contain the end-of-document token."""
    reading = tokenizer.reading_special_tokens()
    end = reading.decode([reading.eod_id])
    file = write_bytes(tmp_path / "a.jsonl", lines([f"one{end}", "two", f"{end}three", ""]))
    build([str(file)], tmp_path / "pile", reading, Fields(), 1, lambda done: None, skip)
    prepared = [ids.tolist() for ids in IndexedDataset(tmp_path / "pile")]
    stream = StreamConfig([str(file)], Fields(), ["pile"], reading, 1, 1)
    streamed = [stream.tokens(Record(0, text, "pile", 0)).tolist() for text in (f"one{end}", "two", f"{end}three")]
    assert sorted(prepared) == sorted(streamed) and sum(ids.count(reading.eod_id) for ids in prepared) == 4


def killed_after(chunks: int, *arguments: Any) -> None:
    """A build whose process is killed when so many chunks are written."""
    calls = count()

    def report(done: Any) -> None:
        if next(calls) == chunks:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=build, args=(*arguments, report, skip))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_killed_build_begins_again(tokenizer: Tokenizer, files: list[str], wanted: Content, tmp_path: Path) -> None:
    """As often as it is killed, before anything is written and in any file, also one of other files."""
    prefix, begun = tmp_path / "new" / "pile", []
    for chunks, given in (0, files), (5, files), (9, files[::-1]), (3, files):
        killed_after(chunks, given, prefix, tokenizer, Fields(), 2)
        assert [path.name for path in prefix.parent.iterdir()] == ["pile.building"]
    done = build(files, prefix, tokenizer, Fields(), 2, begun.append, skip)
    assert content(prefix) == wanted and done.skipped == SKIPPED and done.documents == 90
    assert begun[0] == build_indexed.Progress()
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["pile.bin", "pile.idx", "pile.json"]


@pytest.mark.parametrize("killed", [True, False])
def test_build_that_ends_before_its_index_begins_again(
    tokenizer: Tokenizer,
    files: list[str],
    wanted: Content,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: bool,
) -> None:
    """By a kill or an error, when .bin and .json are at their places already; then it is killed at its beginning."""

    def die_before_the_index(path: Path, to: Path) -> Path:
        if path.name == "idx" and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if path.name == "idx":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return replace(path, to)

    replace, prefix = Path.replace, tmp_path / "pile"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_before_the_index)
        if killed:
            killed_after(1_000, files[:1], prefix, tokenizer, Fields(), 2)
        else:
            with pytest.raises(PermissionError):
                build(files[:1], prefix, tokenizer, Fields(), 2, lambda done: None, skip)
    assert prefix.with_suffix(".bin").exists() and not prefix.with_suffix(".idx").exists()
    killed_after(3, files, prefix, tokenizer, Fields(), 2)
    done = build(files, prefix, tokenizer, Fields(), 2, lambda done: None, skip)
    assert content(prefix) == wanted and done.skipped == SKIPPED and done.documents == 90
    assert not build_indexed.building(prefix).exists()


def test_build_begins_again_after_a_full_disk(
    tokenizer: Tokenizer, files: list[str], wanted: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(writer: IndexedWriter) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(IndexedWriter, "_write_index", fail)
        with pytest.raises(RunError, match=r"cannot be written \(No space left .*\); make room, and start again"):
            build(files, tmp_path / "new" / "pile", tokenizer, Fields(), 2, lambda done: None, skip)
    assert list((tmp_path / "new").iterdir()) == []
    build(files, tmp_path / "new" / "pile", tokenizer, Fields(), 2, lambda done: None, skip)
    assert content(tmp_path / "new" / "pile") == wanted


def test_build_leaves_out_and_counts_documents_without_text(
    tokenizer: Tokenizer, wanted: Content, tmp_path: Path
) -> None:
    """Bad data is an error here."""
    blank = b"\n" + lines(["", " \n"]) + b"  \n"
    content_of = [blank + lines(TEXTS[:5]) + blank + lines(TEXTS[5:50]) + blank, blank, lines(TEXTS[50:]) + blank]
    files = [str(tmp_path / f"{number}.jsonl") for number in range(3)]
    for file, written in zip(files, content_of, strict=True):
        Path(file).write_bytes(written)
    done = build(files, tmp_path / "pile", tokenizer, Fields(), 2, lambda done: None)
    assert content(tmp_path / "pile") == wanted and (done.documents, done.empty, done.skipped) == (90, 20, 0)


@pytest.mark.parametrize("protocol", ["memory://", "file://"])
def test_build_reads_addresses_like_files(
    tokenizer: Tokenizer, files: list[str], wanted: Content, tmp_path: Path, protocol: str
) -> None:
    folder = f"{protocol}{tmp_path}/text"
    if protocol == "memory://":
        for file in files:
            fsspec.filesystem("memory").pipe(file, Path(file).read_bytes())
    arguments = ["prepare-data", f"--data-dir={tmp_path}", f"--tokenizer={tokenizer.name}", "--on-bad-data=skip"]
    for number, given in enumerate([[folder], [f"{folder}/[ab].*", f"{folder}/c.parquet"], [f"{folder}/**/*.*"]]):
        main([*arguments, f"--output={tmp_path}/{number}", "--input", *given])
        assert content(tmp_path / str(number)) == wanted


def test_build_trains_its_tokenizer_on_the_first_documents_of_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_data, "TRAINING_BYTES", 9_000)
    texts = [[f"{name} {'x' * 90}"] * 300 for name in "abc"]
    for name, part in zip("abc", texts, strict=True):
        compressed = zstandard.ZstdCompressor().compress(lines(part))
        fsspec.filesystem("memory").pipe(f"/training/{name}.jsonl.zst", compressed)
    found = list(prepare_data._texts(input_files("memory://training/*.zst"), Fields(), False))
    assert 80 < len(found) < 92 and [text[0] for text in found[::30]] == ["a", "b", "c"]
    (path := tmp_path / "all.jsonl").write_bytes(lines(TEXTS[:40]))
    assert list(prepare_data._texts([str(path)], Fields(), False)) == TEXTS[:40]


def test_build_in_use_is_refused_and_stays(tokenizer: Tokenizer, files: list[str], tmp_path: Path) -> None:
    killed_after(3, files, tmp_path / "pile", tokenizer, Fields(), 1)
    begun = sorted((tmp_path / "pile.building").iterdir())
    with FileLock(tmp_path / "pile.building" / ".lock"), pytest.raises(ValueError, match="another process builds pile"):
        build(files, tmp_path / "pile", tokenizer, Fields(), 1, lambda done: None, skip)
    assert sorted((tmp_path / "pile.building").iterdir()) == begun and len(begun) >= 3


def test_build_reads_no_more_text_than_it_needs(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much there is, and however slow what comes behind the reading."""
    read = count()

    def endless(*arguments: Any, **options: Any) -> Iterator[Record]:
        for number in read:
            yield Record(number, "x" * 300, None, 300)

    class EnoughError(Exception):
        pass

    def report(done: Any) -> None:
        time.sleep(0.001)
        if done.documents >= 100:
            raise EnoughError

    (tmp_path / "text.jsonl").touch()
    monkeypatch.setattr(build_indexed, "read_documents", endless)
    with pytest.raises(EnoughError):
        build([str(tmp_path / "text.jsonl")], tmp_path / "pile", tokenizer, Fields(), 2, report)
    assert next(read) <= 100 + build_indexed.QUEUED * 2 + 1


def test_prepare_data_says_what_it_writes(tokenizer: Tokenizer, files: list[str], tmp_path: Path, capsys: Any) -> None:
    prefix = str(tmp_path / "built" / "pile_text_document")
    arguments = ["prepare-data", f"--data-dir={tmp_path}", f"--tokenizer={tokenizer.name}", f"--output={prefix}"]
    pattern = str(tmp_path / "text" / "*.*")
    main([*arguments, "--input", *files, "--on-bad-data=skip", "--workers=2"])
    out, err = capsys.readouterr()
    assert f"documents  90, {sum(map(is_held_out, TEXTS))} of them for validation" in out
    assert "left out   3 that cannot be used, 1 without text" in out
    assert out.splitlines()[-1] == f"prefix     {prefix}"
    assert "left out: " in err and "a.jsonl, line 11: not JSON" in err
    assert len(IndexedDataset(Path(prefix))) == 90
    for kind in ("idx", "bin", "json"):  # a .json may be the user's text
        with pytest.raises(SystemExit):
            main([*arguments, f"--input={pattern}"])
        assert f"error: output={prefix}: {prefix}.{kind} exists already; name another output" in capsys.readouterr().err
        Path(f"{prefix}.{kind}").unlink()


def test_own_text_is_prepared_and_trained_on_with_its_own_tokenizer(tmp_path: Path, capsys: Any) -> None:
    """The printed prefix is read, also where the files have been moved to."""
    (tmp_path / "text").mkdir()
    for number, repeated in enumerate([2, 20]):
        text = "".join(f"{line}: reading books\n" for line in range(20 * repeated))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    prefix = str(tmp_path / "my own")
    main(["prepare-data", "--vocab-size=280", f"--input={tmp_path}/text", f"--output={prefix}"])
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"prefix     {prefix}"
    (moved := tmp_path / "moved").mkdir()
    for path in tmp_path.glob("my own.*"):
        path.rename(moved / path.name)
    corpus = {"class_path": "nlgmoe.data.MegatronIndexed", "init_args": {"prefix": str(moved / "my own")}}
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    data = load_config(config, data__corpus=corpus, data__data_dir=str(tmp_path / "empty"), data__seq_len=16).data
    data.prepare_data()
    assert next(iter(data.train_dataloader())) and next(iter(data.val_dataloader())) and 256 < data.vocab_size <= 280
    assert "documents  2, 1 of them for validation" in out


@pytest.mark.parametrize(
    ("lengths", "chosen", "held_out"),
    [([1100] * 200, 4, 4), ([1100] * 200, 0, 2), ([90, 5, 5], 1, 2), ([5, 5], 2, 1), ([7], 1, 0)],
)
def test_validation_split_has_what_is_held_out_and_enough(lengths: list[int], chosen: int, held_out: int) -> None:
    assert build_indexed.enough_held_out(np.array(lengths, np.int32), chosen) == held_out
