"""Which files `prepare-data` reads of a folder, and what it says of the others."""

from pathlib import Path

import pytest

from nlgmoe.cli.input_files import input_files


def test_what_a_folder_holds_beside_readable_files_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.bz2", ".hidden", "._a.jsonl"):
        (tmp_path / name).touch()
    assert input_files(str(tmp_path)) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]
    assert "1 of what is in" in (told := capsys.readouterr().err) and "such as c.jsonl.bz2" in told
    (tmp_path / "c.jsonl.bz2").unlink()
    input_files(str(tmp_path))
    assert not capsys.readouterr().err


def test_plain_text_is_read_but_beside_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("README.md", "b.txt.gz"):
        (tmp_path / name).touch()
    assert input_files(str(tmp_path)) == [str(tmp_path / "README.md"), str(tmp_path / "b.txt.gz")]
    (tmp_path / "a.parquet").touch()
    assert input_files(str(tmp_path)) == [str(tmp_path / "a.parquet")]
    assert "2 of what is in" in capsys.readouterr().err
    assert input_files(f"{tmp_path}/*.md") == [str(tmp_path / "README.md")]
