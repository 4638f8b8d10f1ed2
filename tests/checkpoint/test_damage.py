"""Whatever is wrong with a checkpoint is found and named, alone and while loading."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nlgmoe.checkpoint.newest import choose_checkpoint
from nlgmoe.checkpoint.portable import PortableCheckpointIO, load_model
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.commands.main import main
from tests.checkpoint.runs import SaveAt, fit, rewrite_json

EXPERT = "blocks.3.moe.experts.2.expand_weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    fit(folder, SaveAt(3, folder / "a.ckpt"), steps=1)
    return folder / "a.ckpt"


def flip(file: Path, entry: str) -> None:
    """One bit of one value."""
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + header])[entry]["data_offsets"]
    content[8 + header + (begin + end) // 2] ^= 16
    file.write_bytes(content)


def rewrite(change: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> Callable[[Path], None]:
    def damage(ckpt: Path) -> None:
        tensors = load_file(ckpt / file)
        change(tensors)
        save_file(tensors, ckpt / file)

    return damage


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(ckpt: Path) -> None:
        text = (ckpt / file).read_text()
        assert old in text
        (ckpt / file).write_text(text.replace(old, new, 1))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in an expert": (
        lambda ckpt: flip(ckpt / "model.safetensors", EXPERT),
        rf"model.safetensors: {EXPERT} is damaged \(its checksum is \w+, not \w+\)",
    ),
    "a flipped bit in a moment": (
        lambda ckpt: flip(ckpt / "optimizer.safetensors", f"exp_avg_sq/{EXPERT}"),
        f"optimizer.safetensors: exp_avg_sq/{EXPERT} is damaged",
    ),
    "a missing expert": (rewrite(lambda t: t.pop(EXPERT)), f"model.safetensors lacks {EXPERT}"),
    "another shape": (
        rewrite(lambda t: t.update({EXPERT: t[EXPERT].flatten()})),
        rf"{EXPERT} is damaged \(its shape is \[4096\], not \[32, 128\]\)",
    ),
    "a truncated file": (
        lambda ckpt: (ckpt / "model.safetensors").write_bytes((ckpt / "model.safetensors").read_bytes()[:-10]),
        "model.safetensors cannot be read",
    ),
    "no file of moments": (lambda ckpt: (ckpt / "optimizer.safetensors").unlink(), "has no optimizer.safetensors"),
    "a stray file": (
        lambda ckpt: shutil.copy(ckpt / "model.safetensors", ckpt / "model-2.safetensors"),
        "model-2.safetensors is unknown to manifest.json",
    ),
    "half a document": (
        lambda ckpt: (ckpt / "checkpoint.json").write_text((ckpt / "checkpoint.json").read_text()[:-10]),
        "checkpoint.json is damaged",
    ),
    "no document": (lambda ckpt: (ckpt / "checkpoint.json").unlink(), "no checkpoint at"),
    "no manifest": (lambda ckpt: (ckpt / "manifest.json").unlink(), "has no manifest.json"),
    "another program's manifest": (
        lambda ckpt: rewrite_json(ckpt, "manifest.json", lambda manifest: manifest.update(files=3)),
        "manifest.json is not nlgmoe's",
    ),
    "a forged manifest": (edit("manifest.json", EXPERT, "blocks.9.x"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_by_verify_and_by_loading(name: str, good: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    ckpt = tmp_path / "b.ckpt"
    shutil.copytree(good, ckpt)
    damage(ckpt)
    assert any(re.search(message, problem) for problem in find_problems(ckpt)), list(find_problems(ckpt))
    with pytest.raises(ValueError, match=message):
        PortableCheckpointIO().load_checkpoint(ckpt)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("file", ["checkpoint.json", "manifest.json", "model.safetensors"])
def test_a_fifo_is_refused_and_not_waited_for(file: str, good: Path, tmp_path: Path) -> None:
    ckpt = tmp_path / "run/checkpoints/step-1.ckpt"
    shutil.copytree(good, ckpt)
    (ckpt / file).unlink()
    os.mkfifo(ckpt / file)
    message = f"{ckpt / file} is a FIFO, not a regular file"
    assert list(find_problems(ckpt)) == [message]
    with pytest.raises(ValueError, match=message):
        PortableCheckpointIO().load_checkpoint(ckpt)
    with pytest.raises(ValueError, match=r"no valid checkpoint in .* \(.*step-1.ckpt.*\); start a new run"):
        choose_checkpoint(tmp_path / "run")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_anywhere_goes_unnoticed(good: Path, data: st.DataObject) -> None:
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


def test_ranks_share_the_reading_and_miss_nothing(good: Path, tmp_path: Path) -> None:
    ckpt = tmp_path / "b.ckpt"
    shutil.copytree(good, ckpt)
    flip(ckpt / "model.safetensors", EXPERT)
    found = [list(find_problems(ckpt, rank, 3)) for rank in range(3)]
    assert sorted(map(len, found)) == [0, 0, 1]


def test_a_checkpoint_that_lacks_a_part_of_its_model_is_found_though_its_files_agree(tmp_path: Path) -> None:
    trainer = fit(tmp_path, SaveAt(3, tmp_path / "a.ckpt"), steps=1)
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    checkpoint["state_dict"].pop("model.blocks.1.moe.router.weight")
    checkpoint["state_dict"]["model.stray"] = torch.ones(2)
    checkpoint["state_dict"]["model.final_norm.bias"] = torch.ones(3)
    PortableCheckpointIO().save_checkpoint(checkpoint, tmp_path / "b.ckpt")
    assert list(find_problems(tmp_path / "b.ckpt")) == [
        f"{tmp_path}/b.ckpt: model entry final_norm.bias is [3] in the checkpoint, [32] in the model",
        f"{tmp_path}/b.ckpt: model entry blocks.1.moe.router.weight is not in the checkpoint",
        f"{tmp_path}/b.ckpt: model entry stray is not in the model",
    ]
    with pytest.raises(
        ValueError,
        match=r"does not hold the model that it describes: final_norm\.bias .*router\.weight \(not in the checkpoint\)",
    ):
        load_model(tmp_path / "b.ckpt")


def test_weights_that_are_not_finite_are_not_written_and_found(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.ckpt"
    shutil.copytree(good, bad)
    checkpoint = PortableCheckpointIO().load_checkpoint(bad)
    checkpoint["state_dict"]["model.final_norm.bias"][3] = torch.inf
    with pytest.raises(
        ValueError, match=r"the weight final_norm.bias is NaN or infinite; the checkpoint is not written"
    ):
        PortableCheckpointIO().save_checkpoint(dict(checkpoint), bad)
    assert list(find_problems(bad)) == []  # what was there is as it was
    with monkeypatch.context() as unchecked:  # as another program could write it
        unchecked.setattr(Tensor, "isfinite", lambda value: torch.ones_like(value, dtype=torch.bool))
        PortableCheckpointIO().save_checkpoint(dict(checkpoint), bad)
    message = f"{bad / 'model.safetensors'}: final_norm.bias has 1 of 32 values that are NaN or infinite"
    assert list(find_problems(bad)) == [message]
    for read in (load_model, PortableCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=f"{message}; use another checkpoint"):
            read(bad)


def test_a_field_that_a_checkpoint_lacks_has_its_default_and_an_unknown_one_is_refused(
    good: Path, tmp_path: Path
) -> None:
    for name, change in {
        "lacks": lambda document: document["model_config"]["moe"].pop("z_loss_coeff"),
        "unknown": lambda document: document["model_config"]["moe"].update(gate_scale=2.0),
    }.items():
        shutil.copytree(good, tmp_path / f"{name}.ckpt")
        rewrite_json(tmp_path / f"{name}.ckpt", "checkpoint.json", change)
        rewrite_json(
            tmp_path / f"{name}.ckpt", "checkpoint.json", lambda document: document["versions"].update(nlgmoe="9.9")
        )
    assert fit(tmp_path, steps=2, resume=tmp_path / "lacks.ckpt").global_step == 2
    with pytest.raises(ValueError, match=r"moe.gate_scale is not a setting of this nlgmoe; read it with nlgmoe 9.9"):
        fit(tmp_path, steps=2, resume=tmp_path / "unknown.ckpt")


def test_the_verify_command(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(good)])
    said = capsys.readouterr().out
    for part in (
        "step 1, 192 tokens",
        "experts    2 in block 1; 4 in block 3",
        "resumable  yes",
        "model      ",
        "values of float32 in ",
        "valid      ",
    ):
        assert part in said, said
    shutil.copytree(good, tmp_path / "b.ckpt")
    rewrite_json(tmp_path / "b.ckpt", "checkpoint.json", lambda document: document["versions"].clear())
    main(["verify", str(tmp_path / "b.ckpt")])
    assert "by nlgmoe unknown, torch unknown" in capsys.readouterr().out
    flip(tmp_path / "b.ckpt" / "model.safetensors", EXPERT)
    flip(tmp_path / "b.ckpt" / "optimizer.safetensors", f"exp_avg/{EXPERT}")
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tmp_path / "b.ckpt")])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert [line.startswith("error: ") for line in lines] == [True] * 3
    assert f"{EXPERT} is damaged" in lines[0] and f"exp_avg/{EXPERT} is damaged" in lines[1]
    assert "is not valid" in lines[2]
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tmp_path)])
    assert end.value.code == 2
    assert f"{tmp_path} is no checkpoint; there is none in it either" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{"tokens_seen": -1}, {"model_config": [1]}, {"model_config": {"vocab_size": 1, "moe": 5}}], ids=str
)
def test_a_document_of_another_maker_is_a_problem_not_a_crash(changes: dict, good: Path, tmp_path: Path) -> None:
    ckpt = tmp_path / "b.ckpt"
    shutil.copytree(good, ckpt)
    rewrite_json(ckpt, "checkpoint.json", lambda document: document.update(changes))
    (problem,) = find_problems(ckpt)
    assert next(iter(changes)) in problem or "describes no model" in problem
    with pytest.raises(ValueError) as error:
        load_model(ckpt)
    assert str(error.value).startswith(problem)
