"""The portable checkpoint: what it holds, that it survives bad moments, that resuming is exact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.entries import join_experts, split_experts
from nlgmoe.checkpoint.portable import PortableCheckpointIO, load_model
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.routers import SigmoidRouterConfig
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule
from nlgmoe.run.checks import check_same_run
from tests.checkpoint.runs import ACCUMULATE, CONFIG, fit, small_checkpoint, value_of
from tests.support.memory import peak_bytes
from tests.support.synthetic import SyntheticData
from tests.support.trainers import Recorder, SaveAt, trainer

SAVED_AFTER = [9, 11, 12]  # micro-batches; 9: the end of a step; 11: within one; 12: the end, and a validation


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, Trainer]:
    folder, recorder = tmp_path_factory.mktemp("saved"), Recorder()
    saves = [SaveAt(micro_batch, folder / f"{micro_batch}.ckpt") for micro_batch in SAVED_AFTER]
    return folder, recorder, fit(folder, recorder, *saves)


def test_checkpoint_that_is_a_link_is_replaced_and_removed_as_a_link(
    saved: tuple[Path, Recorder, Trainer], tmp_path: Path
) -> None:
    folder, _, fitted = saved
    link, target = tmp_path / "link.ckpt", folder / "9.ckpt"
    before = (target / "manifest.json").read_bytes()
    link.symlink_to(target)
    writing.remove(link)
    assert not link.is_symlink()
    link.symlink_to(target)
    fitted.save_checkpoint(link)
    assert not link.is_symlink() and (link / "manifest.json").read_bytes() != before
    assert (target / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("saved_after", SAVED_AFTER)
def test_resume_at_any_step_gives_the_undisturbed_run_bit_for_bit(
    saved_after: int, saved: tuple[Path, Recorder, Trainer], tmp_path: Path
) -> None:
    (folder, undisturbed, first), resumed = saved, Recorder()
    second = fit(tmp_path, resumed, resume=folder / f"{saved_after}.ckpt")
    window_start = saved_after // ACCUMULATE * ACCUMULATE
    assert resumed.losses == undisturbed.losses[window_start:]
    assert resumed.steps == undisturbed.steps[window_start:]
    assert resumed.rates == undisturbed.rates[window_start // ACCUMULATE :]
    ours, theirs = second.lightning_module.state_dict(), first.lightning_module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert second.global_step == first.global_step
    assert second.fit_loop.epoch_loop.total_batch_idx == first.fit_loop.epoch_loop.total_batch_idx


def test_lightnings_model_checkpoint_keeps_the_best_and_a_run_resumes_from_it(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="val/loss", save_top_k=1, save_last="link")
    run = fit(tmp_path, best)
    assert len([path for path in (tmp_path / "best").iterdir() if not path.is_symlink()]) == 1
    assert (tmp_path / "best" / "last.ckpt").resolve() == Path(best.best_model_path).resolve()
    saved = load_model(tmp_path / "best" / "last.ckpt").parameters()
    assert all(torch.equal(a, b) for a, b in zip(saved, run.lightning_module.parameters(), strict=True))
    resumed = Recorder()
    fit(tmp_path, best, resumed, resume="last", steps=9)
    assert len(resumed.losses) == ACCUMULATE


def test_checkpoint_has_one_entry_per_expert_and_moment_and_no_pickle(tmp_path: Path) -> None:
    run = fit(tmp_path, SaveAt(6, tmp_path / "a.ckpt"), steps=2)
    files = {path.name for path in (tmp_path / "a.ckpt").iterdir()}
    tensors = {"model.safetensors", "optimizer.safetensors", "state.safetensors"}
    assert files <= {"checkpoint.json", "manifest.json"} | tensors
    model = load_file(tmp_path / "a.ckpt" / "model.safetensors")
    stack = run.lightning_module.gpt.blocks[3].moe.experts.up_weight
    for expert in range(4):
        assert torch.equal(model[f"blocks.3.moe.experts.{expert}.up_weight"], stack[expert])
    moments = load_file(tmp_path / "a.ckpt" / "optimizer.safetensors")
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {key.removeprefix(f"{moment}/") for key in moments if key.startswith(f"{moment}/")} == set(model)
    document = json.loads((tmp_path / "a.ckpt" / "checkpoint.json").read_text())
    assert GPTConfig.from_dict(document["model_config"]) == CONFIG
    assert (document["global_step"], document["tokens_seen"]) == (2, 2 * ACCUMULATE * 4 * 16)
    assert document["SyntheticData"]["samples_consumed"] == 2 * ACCUMULATE * 4


def test_splitting_and_joining_experts_are_inverse() -> None:
    entries = {"a.moe.experts.up_bias": torch.arange(6.0).view(3, 2), "a.moe.router.weight": torch.ones(3, 2)}
    split = split_experts(entries)
    assert set(split) == {*(f"a.moe.experts.{e}.up_bias" for e in range(3)), "a.moe.router.weight"}
    joined = join_experts(split)
    assert all(torch.equal(joined[name], entries[name]) for name in entries)
    del split["a.moe.experts.1.up_bias"]
    with pytest.raises(ValueError, match=r"lacks expert\(s\) \[1\] of a.moe.experts.up_bias"):
        join_experts(split)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = PortableCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(small_checkpoint(1.0), path)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(
        ValueError, match=r"a.ckpt cannot be written \(No space left on device\); earlier checkpoints are"
    ):
        io.save_checkpoint(small_checkpoint(0.0), path)
    assert value_of(path) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_callbacks_state_survives_or_is_refused_by_name(tmp_path: Path) -> None:
    state = {"t": torch.tensor([1.5]), "inf": float("inf"), "nested": [{"x": torch.tensor(3)}, None, True]}
    io = PortableCheckpointIO()
    with pytest.raises(ValueError, match="checkpoint entry callbacks/Mine"):
        io.save_checkpoint(small_checkpoint(1.0, callbacks={"Mine": {"a": {3, 4}}}), tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []
    io.save_checkpoint(small_checkpoint(1.0, callbacks={"Mine": state}), tmp_path / "a.ckpt")
    assert io.load_checkpoint(tmp_path / "a.ckpt")["callbacks"]["Mine"] == state


def test_checkpoint_of_another_model_or_seed_is_refused_but_evaluates_with_another_seed(
    saved: tuple[Path, Recorder, Trainer], tmp_path: Path
) -> None:
    path = saved[0] / "9.ckpt"
    other = MoEGPTModule(GPTConfig(61, 16, 4, 32, 2, hidden_dropout=0.1, moe=MoEConfig([4, 4], mlp_type="residual")))
    with pytest.raises(
        ValueError, match=r"moe.num_experts \(saved: \[2, 4\], now: \[4, 4\]\), .*moe.noise \(saved: jit"
    ):
        trainer(tmp_path, max_steps=4).fit(other, SyntheticData(), ckpt_path=path)
    with pytest.raises(ValueError, match=r"model\.seed 1234, not 9"):
        trainer(tmp_path, max_steps=4).fit(MoEGPTModule(CONFIG, seed=9), SyntheticData(), ckpt_path=path)
    evaluates = trainer(tmp_path, limit_val_batches=1.0)
    evaluates.validate(MoEGPTModule(CONFIG, seed=9), SyntheticData(), ckpt_path=path, verbose=False)


def test_a_resumed_run_obeys_its_own_optimizer_settings(saved: tuple[Path, Recorder, Trainer], tmp_path: Path) -> None:
    """A checkpoint brings the optimizer's state; the configuration brings its settings."""
    recorder = Recorder()
    changed = AdamWConfig(lr=5e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    module = MoEGPTModule(CONFIG, changed, LearningRateSchedule("constant"))
    run = trainer(tmp_path, recorder, max_steps=5)
    run.fit(module, SyntheticData(), ckpt_path=saved[0] / "9.ckpt")
    assert recorder.rates == [5e-3, 5e-3]
    decay, no_decay = run.optimizers[0].param_groups
    assert (decay["betas"], decay["eps"], decay["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.3)
    assert no_decay["weight_decay"] == 0.0


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        load_model(tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"format": "nlgmoe-portable", "version": 99}')
    with pytest.raises(ValueError, match="version 99; this nlgmoe reads nlgmoe-portable version 4"):
        load_model(tmp_path)


def test_evaluation_may_change_how_the_gate_begins_and_not_its_weights() -> None:
    config = GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4, top_k=2))
    saved = {"model_config": config.to_dict()}
    begins = replace(config, moe=replace(config.moe, gate_init_std=0.3, loss_coeff=0.1))
    check_same_run(saved, begins, None, "NAME.ckpt")
    for change in ({"gate_scale": 2.0}, {"normalize_weights": False}):
        for router in (None, SigmoidRouterConfig()):
            moe = replace(config.moe, router=router)
            saved = {"model_config": replace(config, moe=moe).to_dict()}
            with pytest.raises(ValueError, match=f"differs from model.config: moe.{next(iter(change))}"):
                check_same_run(saved, replace(config, moe=replace(moe, **change)), None, "NAME.ckpt")


def test_save_copies_no_tensor(tmp_path: Path) -> None:
    module, run = MoEGPTModule(GPTConfig(61, 16, 4, 128, 2, moe=MoEConfig([2, 4]))), trainer(tmp_path, max_steps=1)
    run.fit(module, SyntheticData())
    weights = sum(value.numel() * 4 for value in module.parameters())
    assert peak_bytes(lambda: run.save_checkpoint(tmp_path / "a.ckpt")) < 0.2 * weights
