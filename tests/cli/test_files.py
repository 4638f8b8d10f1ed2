"""Files that commands read and write."""

from pathlib import Path

import pytest

from nlgmoe.data.source_files import input_files


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
