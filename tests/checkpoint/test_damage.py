"""A damaged or missing file of a checkpoint is named, by `verify` and by a resume."""

import errno
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

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.portable import PortableCheckpointIO, load_model
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems, hash_of_weights
from nlgmoe.commands.main import main
from tests.checkpoint.runs import fit
from tests.support.trainers import SaveAt

EXPERT = "blocks.3.moe.experts.2.up_weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    fit(folder, SaveAt(3, folder / "a.ckpt"), steps=1)
    return folder / "a.ckpt"


def flip(file: Path, position: int = -9) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)


def drop_expert(ckpt: Path) -> None:
    tensors = load_file(ckpt / "model.safetensors")
    del tensors["blocks.3.moe.experts.2.up_weight"]
    save_file(tensors, ckpt / "model.safetensors")


def change_manifest(ckpt: Path) -> None:
    file = ckpt / "manifest.json"
    file.write_text(file.read_text().replace("[2]", "[3]", 1))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in a weight": (lambda ckpt: flip(ckpt / "model.safetensors"), r"/model\.safetensors is damaged"),
    "a flipped bit in a moment": (lambda ckpt: flip(ckpt / "optimizer.safetensors"), r"/optimizer\.safetensors is dam"),
    "a flipped bit in the document": (lambda ckpt: flip(ckpt / "checkpoint.json"), r"/checkpoint\.json is damaged"),
    "a file of other tensors": (drop_expert, r"/model\.safetensors is damaged"),
    "a truncated file": (
        lambda ckpt: os.truncate(ckpt / "model.safetensors", (ckpt / "model.safetensors").stat().st_size - 10),
        r"/model\.safetensors is damaged",
    ),
    "no file of moments": (lambda ckpt: (ckpt / "optimizer.safetensors").unlink(), "has no optimizer.safetensors"),
    "no manifest": (lambda ckpt: (ckpt / "manifest.json").unlink(), "has no manifest.json"),
    "a changed manifest": (change_manifest, r"/manifest\.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_by_verify_and_by_loading(name: str, good: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    ckpt = tmp_path / "b.ckpt"
    shutil.copytree(good, ckpt)
    damage(ckpt)
    for ranks in (1, 3):  # which divide the work
        problems = [problem for rank in range(ranks) for problem in find_problems(Checkpoint(ckpt), rank, ranks)]
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
        assert list(find_problems(Checkpoint(good)))
        with pytest.raises(ValueError, match=r"use another checkpoint|this nlgmoe reads"):
            PortableCheckpointIO().load_checkpoint(good)
    finally:
        file.write_bytes(original)


def test_failing_disk_is_no_damage(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an older checkpoint would be resumed, and the newest one put aside as damaged."""

    def fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(find_problems(Checkpoint(good)))


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
    assert list(find_problems(Checkpoint(tmp_path / "b.ckpt"))) == [f"{tmp_path}/b.ckpt: {missing}"]
    with pytest.raises(ValueError, match=r"model entry blocks\.1\.moe\.router\.weight \(saved: missing"):
        load_model(tmp_path / "b.ckpt")


def test_weights_that_are_not_finite_are_not_written(good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ckpt"
    shutil.copytree(good, bad)
    checkpoint = PortableCheckpointIO().load_checkpoint(bad)
    checkpoint["state_dict"]["model.final_norm.bias"][3] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite; the checkpoint is not written"):
        PortableCheckpointIO().save_checkpoint(dict(checkpoint), bad)
    assert list(find_problems(Checkpoint(bad))) == []  # the earlier checkpoint stays


def test_verify_command_names_damage_and_ends_with_a_code(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(good)])
    assert "step 1, 192 tokens; resumable\nvalid: " in capsys.readouterr().out
    shutil.copytree(good, tmp_path / "b.ckpt")
    for name in ("model.safetensors", "optimizer.safetensors"):
        flip(tmp_path / "b.ckpt" / name)
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tmp_path / "b.ckpt")])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and all(line.startswith("error: ") for line in lines)
    for line, part in zip(lines, ("model.safetensors", "optimizer.safetensors", "is not valid"), strict=True):
        assert part in line


def test_hash_of_weights_depends_on_names_and_values_and_not_on_the_files(tmp_path: Path) -> None:
    def written(name: str, *files: dict[str, Tensor]) -> str:
        with writing.new_folder(tmp_path / name) as temporary:
            records: dict[str, Any] = {}
            for number, tensors in enumerate(files):
                records |= writing.write_tensors(temporary, "model", tensors, number, len(files))
            writing.finish(temporary, tmp_path / name, {}, records)
        return hash_of_weights(Checkpoint(tmp_path / name))

    a, b = torch.arange(4.0), torch.ones(2, 3)
    whole = written("whole", {"a": a, "b": b})
    assert written("divided", {"b": b}, {"a": a}) == whole
    others = [{"a": a + 1, "b": b}, {"a": a, "c": b}, {"a": a, "b": b.t().contiguous()}, {"a": a.bfloat16(), "b": b}]
    assert len({whole, *(written(f"other {number}", other) for number, other in enumerate(others))}) == 5
