"""A file that a command writes is there as a whole, or what was there before is."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nlgmoe.checkpoint.weights_only import write_weights
from nlgmoe.cli.output_files import write_whole
from nlgmoe.commands.configs import configs
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.tools.hugging_face import export as exporting
from tests.checkpoint.test_hugging_face import CONFIGS, write


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
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_configurations_that_do_not_fit_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def full(file: Path, content: bytes) -> int:
        file.open("w").close()
        written.append(file)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(ValueError, match=r"output=.*out cannot be written \(No space left on device\)"):
            configs("copy", output=str(tmp_path / "out"))
    assert len(written) == 3 and not any(file.exists() for file in written)
    configs("copy", output=str(tmp_path / "out"))


def test_what_another_process_has_written_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder, checkpoint = tmp_path / "out", tmp_path / "export", tmp_path / "b.ckpt"
    file.write_text("theirs")
    with pytest.raises(ValueError, match="exists already"):
        write_whole(str(file), "ours")
    assert file.read_text() == "theirs"

    config = next(iter(CONFIGS.values()))
    source = write(tmp_path / "a.ckpt", config)

    def meanwhile(path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text("theirs")

    token_ids = exporting.token_ids

    def slow(tokenizer: Tokenizer | None) -> dict[str, Any]:
        meanwhile(folder)
        return token_ids(tokenizer)

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "token_ids", slow)
        with pytest.raises(ValueError, match="export cannot be written"):
            exporting.export(source, folder)
    read = exporting.TensorFiles(source, "model").read

    def reading(name: str) -> Tensor:
        if not checkpoint.exists():
            meanwhile(checkpoint)
        return read(name)

    with pytest.raises(ValueError, match="exists already"):
        write_weights(checkpoint, reading, config)
    assert all([path.name for path in one.iterdir()] == ["config.json"] for one in (folder, checkpoint))
