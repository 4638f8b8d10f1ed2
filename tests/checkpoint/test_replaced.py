"""A checkpoint that its run replaces while a command reads it: no result is of two steps."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nlgmoe import GPT, GPTConfig, MixtureOfStudents, MoEConfig, WarmStart, load_pretrained
from nlgmoe.checkpoint import verify
from nlgmoe.checkpoint.folder import TensorFiles, open_tensors, read_manifest
from nlgmoe.checkpoint.prune import prune
from nlgmoe.checkpoint.upcycle import upcycle
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.checkpoint.warm_start import load_initial_weights
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.validation import SettingError
from tests.checkpoint.test_hugging_face import TOKENIZER, write

DENSE = GPTConfig(300, 16, 2, 16, 2)
MIXTURE = GPTConfig(300, 16, 2, 16, 2, moe=MoEConfig(4))
READERS: dict[str, tuple[GPTConfig, Callable[[Path, Path], Any]]] = {
    "load": (MIXTURE, lambda path, out: load_pretrained(path)),
    "prune": (MIXTURE, lambda path, out: prune(path, out / "new.ckpt", [1], [[0]])),
    "upcycle": (DENSE, lambda path, out: upcycle(path, out / "new.ckpt", MoEConfig(2))),
    "export": (MIXTURE, lambda path, out: export(path, out / "new")),
    "warm start": (MIXTURE, lambda path, out: load_initial_weights(GPT(MIXTURE), WarmStart(str(path)))),
    "teacher": (MIXTURE, lambda path, out: MixtureOfStudents(str(path)).load(MIXTURE, torch.empty(0), None)),
}


def replace_once(checkpoint: Path, new: Path) -> None:
    if new.exists():
        os.rename(checkpoint, checkpoint.with_name("old"))
        os.rename(new, checkpoint)


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_replaced_while_it_is_read_is_refused(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read = READERS[reader]
    configs = {"a": config, "b": replace(config, init_std=0.3)}
    first, second = (
        write(tmp_path / f"{name}.ckpt", one, tokenizer=TOKENIZER.to_json()) for name, one in configs.items()
    )
    opened = TensorFiles.__init__

    def replaced(*arguments: Any, **settings: Any) -> None:
        replace_once(first, second)  # as a run does: the document has been read, the weights have not
        opened(*arguments, **settings)

    monkeypatch.setattr(TensorFiles, "__init__", replaced)
    with pytest.raises(ValueError, match=r"a\.ckpt was replaced while it was read, as by a run that saves it"):
        read(first, tmp_path)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.ckpt").exists()


@pytest.mark.parametrize("reader", ["load", "prune", "upcycle", "export", "warm start"])
def test_what_is_no_checkpoint_is_said_first(reader: str, tmp_path: Path) -> None:
    (empty := tmp_path / "empty.ckpt").mkdir()
    (file := tmp_path / "file.ckpt").touch()
    for path, message in (
        (empty, "expected a folder with checkpoint.json"),
        (file, "is a file, not a checkpoint folder"),
    ):
        with pytest.raises(SettingError, match=message):
            READERS[reader][1](path, tmp_path)


def test_what_is_replaced_while_it_is_verified_is_not_called_damaged_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {"a": MIXTURE, "b": replace(MIXTURE, init_std=0.3)}
    first, second = (write(tmp_path / f"{name}.ckpt", one) for name, one in configs.items())

    def replaced(file: Path) -> Any:
        replace_once(first, second)
        return open_tensors(file)

    monkeypatch.setattr(verify, "open_tensors", replaced)
    *damaged, last = find_problems(first)
    assert "is damaged" in damaged[0] and last.startswith(f"{first} was replaced while it was read")
    assert list(find_problems(first)) == []


def test_experts_are_not_pruned_by_the_use_of_other_weights(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.ckpt", MIXTURE) for name in ("a", "b")]
    with pytest.raises(ValueError, match="was replaced while it was read"):
        prune(paths[0], tmp_path / "new.ckpt", [1], [[0]], measured=read_manifest(paths[1])["checksum"])
    assert not (tmp_path / "new.ckpt").exists()
    prune(paths[0], tmp_path / "new.ckpt", [1], [[0]], measured=read_manifest(paths[0])["checksum"])
