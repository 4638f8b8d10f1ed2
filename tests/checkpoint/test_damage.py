"""Whatever is wrong with a checkpoint is found and named, alone and while loading."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nlgmoe.checkpoint.portable import PortableCheckpointIO, load_model
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.commands.main import main
from tests.checkpoint.runs import fit
from tests.support.trainers import SaveAt

EXPERT = "blocks.3.moe.experts.2.up_weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    fit(folder, SaveAt(3, folder / "a.ckpt"), steps=1)
    return folder / "a.ckpt"


def flip(file: Path, entry: str) -> None:
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + header])[entry]["data_offsets"]
    content[8 + header + (begin + end) // 2] ^= 16
    file.write_bytes(content)


def drop_expert(ckpt: Path) -> None:
    tensors = load_file(ckpt / "model.safetensors")
    del tensors[EXPERT]
    save_file(tensors, ckpt / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in an expert": (
        lambda ckpt: flip(ckpt / "model.safetensors", EXPERT),
        rf"model.safetensors: {EXPERT} is damaged \(its checksum is \w+, not \w+\)",
    ),
    "a missing expert": (drop_expert, f"model.safetensors lacks {EXPERT}"),
    "a truncated file": (
        lambda ckpt: os.truncate(ckpt / "model.safetensors", (ckpt / "model.safetensors").stat().st_size - 10),
        "model.safetensors cannot be read",
    ),
    "no file of moments": (lambda ckpt: (ckpt / "optimizer.safetensors").unlink(), "has no optimizer.safetensors"),
    "no manifest": (lambda ckpt: (ckpt / "manifest.json").unlink(), "has no manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_by_verify_and_by_loading(name: str, good: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    ckpt = tmp_path / "b.ckpt"
    shutil.copytree(good, ckpt)
    damage(ckpt)
    for ranks in (1, 3):  # which divide the work
        problems = [problem for rank in range(ranks) for problem in find_problems(ckpt, rank, ranks)]
        assert any(re.search(message, problem) for problem in problems), problems
    with pytest.raises(ValueError, match=message):
        PortableCheckpointIO().load_checkpoint(ckpt)


@settings(max_examples=40)
@given(data=st.data())
def test_flipped_bit_anywhere_is_noticed(good: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(good.iterdir())))
    original = file.read_bytes()
    # Headers are a small part of the files, and the part where a flip could mean something.
    position = data.draw(st.integers(0, len(original) - 1) | st.integers(0, min(len(original), 6000) - 1))
    flipped = bytearray(original)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(flipped)
        assert list(find_problems(good))
    finally:
        file.write_bytes(original)


def test_failing_disk_is_no_damage(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an older checkpoint would be resumed, and the newest one put aside as damaged."""

    def fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(find_problems(good))


def test_a_field_that_a_checkpoint_lacks_has_its_default_and_an_unknown_one_is_refused(
    good: Path, tmp_path: Path
) -> None:
    io = PortableCheckpointIO()
    for name, change in {
        "lacks": lambda moe: [moe.pop(field) for field in ("z_loss_coeff", "gate_scale", "normalize_weights")],
        "unknown": lambda moe: moe.update(gate_width=2.0),
    }.items():
        checkpoint = io.load_checkpoint(good)
        change(checkpoint["model_config"]["moe"])
        io.save_checkpoint(checkpoint, tmp_path / f"{name}.ckpt")
    assert fit(tmp_path, steps=2, resume=tmp_path / "lacks.ckpt").global_step == 2
    with pytest.raises(ValueError, match=r"checkpoint.json, written by nlgmoe \d.* describes no model: .*gate_width"):
        fit(tmp_path, steps=2, resume=tmp_path / "unknown.ckpt")


def test_a_checkpoint_that_lacks_a_part_of_its_model_is_found_though_its_files_agree(tmp_path: Path) -> None:
    trainer = fit(tmp_path, SaveAt(3, tmp_path / "a.ckpt"), steps=1)
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    checkpoint["state_dict"].pop("model.blocks.1.moe.router.weight")
    PortableCheckpointIO().save_checkpoint(checkpoint, tmp_path / "b.ckpt")
    missing = "model entry blocks.1.moe.router.weight (saved: missing, now: [2, 32])"
    assert list(find_problems(tmp_path / "b.ckpt")) == [f"{tmp_path}/b.ckpt: {missing}"]
    with pytest.raises(ValueError, match=r"does not hold the model .* blocks\.1\.moe\.router\.weight"):
        load_model(tmp_path / "b.ckpt")


def test_weights_that_are_not_finite_are_neither_written_nor_read(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.ckpt"
    shutil.copytree(good, bad)
    checkpoint = PortableCheckpointIO().load_checkpoint(bad)
    checkpoint["state_dict"]["model.final_norm.bias"][3] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite; the checkpoint is not written"):
        PortableCheckpointIO().save_checkpoint(dict(checkpoint), bad)
    assert list(find_problems(bad)) == []  # the earlier checkpoint stays
    with monkeypatch.context() as unchecked:  # as another program could write it
        unchecked.setattr(Tensor, "isfinite", lambda value: torch.ones_like(value, dtype=torch.bool))
        PortableCheckpointIO().save_checkpoint(dict(checkpoint), bad)
    message = f"{bad / 'model.safetensors'}: final_norm.bias has 1 of 32 values that are NaN or infinite"
    assert list(find_problems(bad)) == [message]
    for read in (load_model, PortableCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=message):
            read(bad)


def test_verify_command_names_damage_and_ends_with_a_code(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(good)])
    assert "step 1, 192 tokens; resumable\nvalid: " in capsys.readouterr().out
    shutil.copytree(good, tmp_path / "b.ckpt")
    flip(tmp_path / "b.ckpt" / "model.safetensors", EXPERT)
    flip(tmp_path / "b.ckpt" / "optimizer.safetensors", f"exp_avg/{EXPERT}")
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tmp_path / "b.ckpt")])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and all(line.startswith("error: ") for line in lines)
    for line, part in zip(lines, (EXPERT, f"exp_avg/{EXPERT}", "is not valid"), strict=True):
        assert part in line
