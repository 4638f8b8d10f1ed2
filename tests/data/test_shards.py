"""A corpus that N processes prepare, each without knowledge of the others, has what one process prepares."""

import multiprocessing
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlgmoe.commands.main import main
from nlgmoe.data import IndexedDataset, MegatronIndexed, Tokenizer
from nlgmoe.data.build_indexed import build_indexed, building
from nlgmoe.data.documents import Fields, read_documents
from nlgmoe.data.prefix import Sidecar, find_prefixes
from nlgmoe.data.source_files import DataFile, Shard
from nlgmoe.validation import RunError, SettingError
from tests.support.documents import lines, write_bytes, write_records

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {number}: naïve 日本\n" + "reading books " * (number * 7 % 40) for number in range(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind, of unlike sizes."""
    folder = tmp_path / "text"
    write_bytes(folder / "a.jsonl", lines(TEXTS[:150]).rstrip(b"\n"))
    write_bytes(folder / "b.jsonl.zst", lines(TEXTS[150:200]))
    write_records(folder / "c.parquet", [{"text": text} for text in TEXTS[200:290]])
    write_bytes(folder / "d.jsonl", b"\n" + lines(TEXTS[290:]))
    return folder


def build(folder: Path, prefix: Path, tokenizer: Tokenizer, shard: Shard | None = None) -> Any:
    files = sorted(map(str, folder.iterdir()))
    return build_indexed(files, prefix, tokenizer, Fields(), 1, lambda done: None, shard=shard)


def documents(prefix: Path) -> tuple[list[bytes], list[bytes]]:
    """Tokens of each document, for training and held out, sorted."""
    dataset, sidecar = IndexedDataset(prefix), Sidecar.read(prefix)
    assert sidecar is not None and sidecar.documents == len(dataset)
    found = [dataset[number].tobytes() for number in range(len(dataset))]
    first = len(found) - sidecar.held_out
    return found[:first], found[first:]


@pytest.mark.parametrize("count", [1, 3, 4, 40])
def test_shards_have_the_documents_of_one_build(tokenizer: Tokenizer, folder: Path, tmp_path: Path, count: int) -> None:
    whole = build(folder, tmp_path / "whole", tokenizer)
    shards = [Shard(number + 1, count) for number in range(count)]
    built = [build(folder, shard.prefix(tmp_path / "own"), tokenizer, shard) for shard in shards]
    for fact in ("documents", "bytes", "tokens", "held_out", "empty", "skipped"):
        assert sum(getattr(part, fact) for part in built) == getattr(whole, fact)
    assert whole.documents == 300 and whole.empty == 1 and whole.held_out > 10
    found = [documents(prefix) for prefix in find_prefixes([str(tmp_path / "own")])]
    # In this order: shard by shard it is that of the text.
    assert [[text for part in found for text in part[split]] for split in (0, 1)] == list(documents(tmp_path / "whole"))
    corpora = [MegatronIndexed(str(tmp_path / name)).open(tmp_path, tokenizer.name) for name in ("whole", "own")]
    (one,), (many,) = [corpus.tokens["train"] for corpus in corpora]
    assert np.array_equal(one[:], many[:]) and corpora[1].domains == ["own"]
    if count in (3, 4):
        assert max(part.documents for part in built) < 2.2 * 300 / count
    assert (min(part.documents for part in built) == 0) == (count == 40)


def test_shards_hold_out_the_share_of_all_files(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("nlgmoe.data.build_indexed.SMALL_BYTES", 30_000)
    path = write_bytes(tmp_path / "text" / "large.jsonl", lines(TEXTS * 3))
    assert path.stat().st_size > 30_000 * 4
    whole = build(path.parent, tmp_path / "whole", tokenizer)
    shards = [Shard(number, 9) for number in range(1, 10)]
    built = [build(path.parent, shard.prefix(tmp_path / "own"), tokenizer, shard).held_out for shard in shards]
    assert sum(built) == whole.held_out < 0.04 * 900


def test_shards_read_each_line_once_wherever_a_file_is_cut(tmp_path: Path) -> None:
    """Also at a line's first byte, its last, and behind an end without a line break."""
    (path := tmp_path / "text.jsonl").write_bytes(lines(["a", "b" * 40, "", "c"]).rstrip(b"\n"))
    size = path.stat().st_size
    for cut in range(1, size):
        spans = [range(cut), range(cut, size)]
        texts = [[record.content for record in read_documents(path, Fields(), span=span)] for span in spans]
        assert texts[0] + texts[1] == ["a", "b" * 40, "c"]
        begins = [len(lines(["a", "b" * 40, "", "c"][:count])) for count in range(1, 4)]
        assert len(texts[0]) == 1 + (cut > begins[0]) + (cut > begins[2])
    path.write_bytes(lines(["a" * 100, "b"]) + b"no JSON\n")
    with pytest.raises(RunError, match=r"text\.jsonl, line 2 of those from byte 50 on: not JSON"):
        list(read_documents(path, Fields(), span=range(50, 1000)))


def test_shards_divide_bytes_without_gaps(tmp_path: Path) -> None:
    sizes = {"a.json": 100, "b.gz": 30, "s3://c.jsonl": 30, "d.parquet": 7}
    files = [DataFile(name, size) for name, size in sizes.items()]
    for count in (1, 2, 3, 7, 200):
        columns = zip(*(Shard(number + 1, count).spans(files) for number in range(count)), strict=True)
        for file, spans in zip(files, columns, strict=True):
            assert [byte for span in spans for byte in span[: file.bytes]] == list(range(file.bytes))
    empty = [DataFile("memory://a.jsonl", 0), DataFile("b.jsonl", 0)]  # or of unknown sizes
    for number in (1, 2):
        assert [bool(span) for span in Shard(number, 2).spans(empty)] == [number == 1, number == 2]


def test_a_killed_shard_resumes_with_the_same_input_alone(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("nlgmoe.data.build_indexed.CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr("nlgmoe.data.build_indexed.RECORD_SECONDS", 0.0)

    def stop(done: Any) -> None:
        if done.documents > 20:
            raise KeyboardInterrupt

    files = sorted(map(str, folder.iterdir()))
    for number in (2, 3):
        begun: list[Any] = []
        prefix, shard = tmp_path / str(number), Shard(number, 4)
        wanted = build(folder, tmp_path / f"{number}-whole", tokenizer, shard)
        with pytest.raises(KeyboardInterrupt):
            build_indexed(files, prefix, tokenizer, Fields(), 1, stop, shard=shard)
        assert building(prefix).exists()
        with pytest.raises(RunError, match=r"other settings \(shard\)"):
            build(folder, prefix, tokenizer, Shard(number, 5))
        with pytest.raises(RunError, match=r"other settings \(files\)"):
            build_indexed(files[1:], prefix, tokenizer, Fields(), 1, stop, shard=shard)
        done = build_indexed(files, prefix, tokenizer, Fields(), 1, begun.append, shard=shard)
        assert done == wanted and begun[0].documents > 0
        assert documents(prefix) == documents(tmp_path / f"{number}-whole")


def test_shards_of_a_folder_that_changed_are_refused(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """A file more moves the borders: documents are repeated, or lost."""
    for number in (1, 2):
        build(folder, tmp_path / f"own-{number}-of-2", tokenizer, Shard(number, 2))
        (folder / "aa.jsonl").write_bytes(lines(TEXTS[:50]))
    with pytest.raises(SettingError, match=r"own-2-of-2: other files were divided than for the first shard of .*own;"):
        MegatronIndexed(str(tmp_path / "own")).open(tmp_path, tokenizer.name)


def test_array_job_prepares_shards_with_a_tokenizer_that_is_trained_once(folder: Path, tmp_path: Path) -> None:
    """By two processes, with the words of the script for Slurm; the second task is submitted by itself, after it failed."""
    main(["prepare-data", f"--input={folder}/a.jsonl", "--vocab-size=300", f"--output={tmp_path}/first"])
    (command := tmp_path / ".venv" / "bin" / "nlgmoe").parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    command.chmod(0o755)
    settings = {"INPUT": f"{folder}/*", "OUTPUT": f"{tmp_path}/own", "TOKENIZER": f"{tmp_path}/first.tokenizer"}
    settings["PATH"] = "/usr/bin:/bin"
    processes = []
    for number, shards in (1, {"SLURM_ARRAY_TASK_COUNT": "2"}), (2, {"SLURM_ARRAY_TASK_COUNT": "1", "SHARDS": "2"}):
        task = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_CPUS_PER_TASK": "1"} | shards
        script = ["bash", str(ROOT / "docs/examples/prepare_pile.sbatch")]
        words = subprocess.run(script, env=settings | task, cwd=tmp_path, check=True, capture_output=True, text=True)
        processes.append(multiprocessing.get_context("fork").Process(target=main, args=(words.stdout.splitlines(),)))
        processes[-1].start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = [documents(prefix) for prefix in find_prefixes([str(tmp_path / "own")])]
    assert len(found) == 2 and sum(len(part) for parts in found for part in parts) == 300
