"""Warm start: the weights of a checkpoint and nothing else of it; strict, or with a list of what differed."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.pyramid import ExpertPlacement
from nlgmoe.surgery.warm_start import WarmStart, load_initial_weights
from nlgmoe.surgery.write_weights import write_weights
from nlgmoe.tools.hugging_face.export import export
from tests.support.synthetic import SyntheticData
from tests.support.trainers import Recorder, trainer

CONFIG = GPTConfig(61, 16, 4, 32, 2, moe=MoEConfig([2, 4], mlp_type="residual"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps: whole.ckpt, and weights.ckpt without optimizer."""
    folder = tmp_path_factory.mktemp("trained")
    weights = ModelCheckpoint(folder, "weights", save_weights_only=True, every_n_train_steps=5, save_top_k=1)
    run = trainer(folder, weights, max_steps=5, enable_checkpointing=True)
    run.fit(MoEGPTModule(CONFIG, AdamWConfig(lr=1e-2)), SyntheticData())
    run.save_checkpoint(folder / "whole.ckpt")
    run.save_checkpoint(folder / "run/checkpoints/step-5.ckpt")
    return folder


def module(start: WarmStart | None, config: GPTConfig = CONFIG, **settings: Any) -> MoEGPTModule:
    return MoEGPTModule(config, AdamWConfig(lr=1e-2), warm_start=start, **settings)


@pytest.mark.parametrize("name", ["whole.ckpt", "run"])  # the last: its newest
def test_warm_start_takes_the_weights_and_nothing_else(name: str, trained: Path, tmp_path: Path) -> None:
    def validated(model: MoEGPTModule, **options: Any) -> Any:
        run = trainer(tmp_path, limit_val_batches=1.0)
        return run.validate(model, SyntheticData(), verbose=False, **options)[0]["val/loss"]

    start = WarmStart(str(trained / name))
    expected = validated(module(None), ckpt_path=trained / name)
    assert validated(module(start)) == expected != validated(module(None))

    warm, data, recorder = module(start), SyntheticData(), Recorder()
    trainer(tmp_path, recorder, max_steps=2).fit(warm, data)
    assert (warm.tokens_seen, data.samples_consumed) == (2 * 4 * 16, 2 * 4)  # from zero
    assert recorder.steps[0][0] == 0 + 1
    by_hand, first = module(None), Recorder()
    by_hand.gpt.load_state_dict(module(start).gpt.state_dict())
    trainer(tmp_path, first, max_steps=2).fit(by_hand, SyntheticData())
    assert recorder.losses == first.losses  # the same optimizer, data and noise as a new run with these weights


@pytest.mark.parametrize(
    ("gpt", "moe", "words"),
    [
        ({}, {"num_experts": [2, 6]}, "router.weight (saved: [4, 32], now: [6, 32])"),
        ({"num_layers": 6}, {"num_experts": [2, 4, 4]}, "blocks.4.attention_norm.weight (saved: missing, now: [32])"),
    ],
    ids=["more experts", "deeper"],
)
def test_warm_start_refuses_or_lists_what_does_not_fit(
    gpt: dict[str, Any], moe: dict[str, Any], words: str, trained: Path
) -> None:
    config = replace(CONFIG, **gpt, moe=replace(CONFIG.moe, **moe))
    start = WarmStart(str(trained / "whole.ckpt"))
    with pytest.raises(ValueError, match=r"do not fit the model.*model.warm_start.strict=false") as error:
        module(start, config).configure_model()
    assert words in str(error.value)

    model, files = GPT(config, seed=3), Checkpoint(trained / "whole.ckpt").tensors("model")
    loaded = load_initial_weights(model, replace(start, strict=False))
    untouched, counted = GPT(config, seed=3).state_dict(), 0
    for name, value in model.state_dict().items():
        for expert, part in enumerate(value) if ".moe.experts." in name else [(None, value)]:
            entry = name if expert is None else name.replace(".experts.", f".experts.{expert}.")
            fits = entry in files.shapes and files.read(entry).shape == part.shape
            start_value = untouched[name] if expert is None else untouched[name][expert]
            assert torch.equal(part, files.read(entry) if fits else start_value), entry
            counted += part.numel() * fits
    total = sum(value.numel() for value in untouched.values())
    assert f"loaded {counted:,} of {total:,} values" in loaded.report


def test_warm_start_refuses_nothing_in_common_and_names_another_number_of_heads(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = WarmStart(str(trained / "whole.ckpt"), strict=False)
    with pytest.raises(ValueError, match=r"no tensor of .* fits the model"):
        module(start, GPTConfig(61, 8, 4, 16, 2)).configure_model()
    with caplog.at_level("INFO"):
        module(start, replace(CONFIG, num_heads=4)).configure_model()
    assert "model.config differed: num_heads (saved: 2, now: 4)" in caplog.text  # no shape shows it


def test_weights_alone_are_evaluated_as_they_are_but_not_resumed(trained: Path, tmp_path: Path) -> None:
    path = trained / "weights.ckpt"
    assert {file.name for file in path.glob("*.safetensors")} == {"model.safetensors"}
    (other := trainer(tmp_path, max_steps=1)).fit(module(None), SyntheticData())
    other.save_checkpoint(tmp_path / "other.ckpt")
    losses = [
        trainer(tmp_path, limit_val_batches=1.0).validate(module(start), SyntheticData(), path, verbose=False)
        for start in (None, WarmStart(str(tmp_path / "other.ckpt")))
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"weights only: start a new run from it with model.warm_start.checkpoint="):
        trainer(tmp_path, max_steps=9).fit(module(None), SyntheticData(), ckpt_path=path)


def test_warm_start_is_still_named_by_a_resumed_run(trained: Path, tmp_path: Path) -> None:
    source, path = trained / "whole.ckpt", tmp_path / "warm.ckpt"
    for start, steps, resumed in ((WarmStart(str(source)), 2, None), (None, 4, path)):
        run = trainer(tmp_path, max_steps=steps)
        run.fit(module(start), SyntheticData(), ckpt_path=resumed)
        run.save_checkpoint(path)
    assert Checkpoint(path).document["started_from"] == str(source)
    export(path, tmp_path / "exported")
    assert f"from the weights of {'/'.join(source.parts[-3:])} |" in (tmp_path / "exported/README.md").read_text()


def test_warm_start_takes_the_blocks_that_are_named(trained: Path) -> None:
    """A student of three blocks, whose one MoE block is the teacher's last; and of a rank, its own experts alone."""
    config = replace(CONFIG, num_layers=3, moe=replace(CONFIG.moe, num_experts=[4]))
    start = WarmStart(str(trained / "whole.ckpt"), layers=[2, 3, 2])
    stored = Checkpoint(trained / "whole.ckpt").tensors("model")
    for placements in ({}, {1: ExpertPlacement(first=2, count=2)}):
        model = GPT(config, placements=placements)
        report = load_initial_weights(model, start).report
        assert "blocks 2, 3, 2 (counted from 0): loaded" in report and "\n" not in report
        for name, value in model.state_dict().items():
            source = re.sub(r"^blocks\.(\d)", lambda block: f"blocks.{[2, 3, 2][int(block[1])]}", name)
            if ".moe.experts." in name:
                experts = (2, 3) if placements else range(4)
                names = [source.replace(".experts.", f".experts.{expert}.") for expert in experts]
                assert torch.equal(value, torch.stack([stored.read(entry) for entry in names]))
            else:
                assert torch.equal(value, stored.read(source))
    with pytest.raises(ValueError, match=r"blocks 0, 1, 2 \(counted from 0\) do not fit the model: blocks\.1\.moe"):
        load_initial_weights(GPT(config), replace(start, layers=[0, 1, 2]))


def test_weights_alone_do_not_replace_a_checkpoint_that_a_run_can_resume(trained: Path) -> None:
    read = Checkpoint(trained / "whole.ckpt").tensors("model").read
    with pytest.raises(ValueError, match=r"whole.ckpt is not replaced by weights alone: a run can be resumed from it"):
        write_weights(trained / "whole.ckpt", read, CONFIG, overwrite=True)
