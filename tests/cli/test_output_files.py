"""A file that a command writes is there as a whole, or what was there before is."""

from pathlib import Path

import pytest

from nlgmoe.cli.output_files import write_whole


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    write_whole(str(path), "before")

    def full(file: Path, text: str, encoding: str) -> None:
        file.open("w").close()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(ValueError, match=r"output=.*out cannot be written \(No space left on device\); make room"):
            write_whole(str(path), "after")
    with pytest.raises(ValueError, match="exists already"):
        write_whole(str(path), "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
