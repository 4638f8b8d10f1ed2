"""A corpus that N processes prepare, each without knowledge of the others, has what one process prepares."""

import multiprocessing
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nlgmoe.commands.main import main
from nlgmoe.data import IndexedDataset, MegatronIndexed, Tokenizer
from nlgmoe.data.build_indexed import build_indexed
from nlgmoe.data.documents import Fields
from nlgmoe.data.prefix import Sidecar, find_prefixes
from nlgmoe.data.source_files import part_of
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


def build(files: list[str], prefix: Path, tokenizer: Tokenizer, **options: Any) -> Any:
    return build_indexed(files, prefix, tokenizer, Fields(), 1, lambda done: None, **options)


def build_shards(folder: Path, output: Path, tokenizer: Tokenizer, count: int) -> list[Any]:
    files = sorted(map(str, folder.iterdir()))
    parts = [part_of(files, f"{number}/{count}") for number in range(1, count + 1)]
    return [build(part, Path(f"{output}{suffix}"), tokenizer, whole=files) for part, suffix in parts]


def documents(prefix: Path) -> tuple[list[bytes], list[bytes]]:
    """Tokens of each document, for training and held out, sorted."""
    dataset, sidecar = IndexedDataset(prefix), Sidecar.read(prefix)
    assert sidecar is not None and sidecar.documents == len(dataset)
    found = [dataset[number].tobytes() for number in range(len(dataset))]
    first = len(found) - sidecar.held_out
    return found[:first], found[first:]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_shards_have_the_documents_of_one_build(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, monkeypatch: Any, count: int
) -> None:
    monkeypatch.setattr("nlgmoe.data.build_indexed.VALIDATION_TOKENS", 0)  # no more than those chosen by hash
    whole = build(sorted(map(str, folder.iterdir())), tmp_path / "whole", tokenizer)
    built = build_shards(folder, tmp_path / "own", tokenizer, count)
    for fact in ("documents", "bytes", "tokens", "held_out", "empty", "skipped"):
        assert sum(getattr(part, fact) for part in built) == getattr(whole, fact)
    assert whole.documents == 300 and whole.empty == 1 and whole.held_out > 10
    found = [documents(prefix) for prefix in find_prefixes([str(tmp_path / "own")])]
    for split, wanted in enumerate(documents(tmp_path / "whole")):
        assert sorted(text for part in found for text in part[split]) == sorted(wanted)
    assert MegatronIndexed(str(tmp_path / "own")).open(tmp_path, tokenizer.name).domains == ["own"]
    assert (min(part.documents for part in built) == 0) == (count == 40)


def test_shards_hold_out_the_share_of_all_files(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("nlgmoe.data.build_indexed.SMALL_BYTES", 200_000)
    monkeypatch.setattr("nlgmoe.data.build_indexed.VALIDATION_TOKENS", 0)
    files = [write_bytes(tmp_path / "text" / f"{number}.jsonl", lines(TEXTS)) for number in range(3)]
    assert all(path.stat().st_size < 200_000 / 2 for path in files)
    whole = build(list(map(str, files)), tmp_path / "whole", tokenizer)
    built = build_shards(tmp_path / "text", tmp_path / "own", tokenizer, 3)
    assert 0 < sum(part.held_out for part in built) == whole.held_out < 0.04 * 900


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
