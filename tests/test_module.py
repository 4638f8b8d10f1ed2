"""MoEGPTModule under Lightning: the loss and what counts in it, token clock, learning rate, evaluation by domain."""

import csv
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F

from nlgmoe import ZeroShotEval
from nlgmoe.batch import Batch
from nlgmoe.callbacks import ExpertLoad, SaveCheckpoints, Throughput
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import router_losses
from nlgmoe.module import MoEGPTModule
from nlgmoe.non_finite import NonFinite
from nlgmoe.optim.optimizer import AdamWConfig, build_optimizer
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.step import Window
from nlgmoe.validation import RunError
from tests.support.synthetic import SyntheticData
from tests.support.trainers import CONFIG, Recorder, SaveAt, run_validation, trainer

DROPLESS = GPTConfig(61, 16, 2, 32, 2, init_std=0.2, moe=MoEConfig(4, token_dropping=False, loss_coeff=0.0))


def test_the_loss_is_cross_entropy_plus_weighted_router_losses(tmp_path: Path) -> None:
    module, data, recorder = MoEGPTModule(CONFIG, loss_chunk_size=7), SyntheticData(), Recorder()
    batch = next(iter(data.train_dataloader()))
    output = module.gpt(batch["tokens"], noise_key=(module.seed, 0, 0))
    expected = F.cross_entropy(module.gpt.logits(output.hidden).flatten(0, 1), batch["targets"].flatten())
    balance, z_loss = router_losses(output.routings)
    expected += 0.01 * balance + 0.001 * z_loss
    trainer(tmp_path, recorder, max_steps=1).fit(module, data)
    assert recorder.losses[0] == pytest.approx(expected.item(), rel=1e-6)


def losses_of(module: MoEGPTModule, batch: Batch) -> Tensor:
    """Return the loss of each token, counted or not, by PyTorch's own function."""
    hidden = module.gpt(batch["tokens"], batch["token_mask"], documents=batch["document"]).hidden
    logits, targets = module.gpt.logits(hidden).flatten(0, 1), batch["targets"]
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def test_compile_setting_compiles_the_dense_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []  # what becomes of them, tests/layers/test_experts.py shows
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__name__) or function)
    assert MoEGPTModule(CONFIG).gpt and not compiled
    assert MoEGPTModule(CONFIG, compile=True).gpt and compiled.count("attend") == CONFIG.num_layers


def test_clock_counts_tokens_and_the_learning_rate_follows_it(tmp_path: Path) -> None:
    recorder, data = Recorder(), SyntheticData(micro_batch_size=2)
    schedule = LearningRateSchedule("cosine", min_lr=0.0, warmup_tokens=128, decay_tokens=512)
    module = MoEGPTModule(CONFIG, AdamWConfig(lr=1e-3), schedule)
    run = trainer(tmp_path, recorder, max_steps=6, accumulate_grad_batches=2)
    run.fit(module, data)
    assert (module.tokens_seen, data.samples_consumed) == (6 * 2 * 2 * 16, 6 * 2 * 2)
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * done / 6)) for done in range(4)]
    assert recorder.rates == pytest.approx([0.0, 0.5e-3, *cosine])
    assert float(run.callback_metrics["train/lr"]) == pytest.approx(cosine[-1])


class OptimizerAlone(MoEGPTModule):
    """A subclass with an optimizer of its own groups and, as Lightning allows, no scheduler."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(build_optimizer(self.gpt, self.optimizer_config).param_groups, lr=1e-3)


def test_train_tokens_ends_the_run_at_the_end_of_that_step_also_without_a_scheduler(tmp_path: Path) -> None:
    schedule = LearningRateSchedule(warmup_tokens=128, decay_tokens=512)
    rates: list[list[float]] = []
    for kind in (MoEGPTModule, OptimizerAlone):
        module, data, recorder = kind(CONFIG, schedule=schedule, train_tokens=150), SyntheticData(), Recorder()
        run = trainer(tmp_path, recorder, max_steps=9)
        run.fit(module, data)  # 64 tokens a step
        assert (run.global_step, module.tokens_seen, data.samples_consumed) == (3, 192, 12)
        rates.append(recorder.rates)
    assert rates[0] == rates[1] and len(set(rates[0])) == 3


def test_a_run_ends_with_a_whole_step_that_is_logged_and_validated(tmp_path: Path) -> None:
    """Also if a callback asks for the end at the first of a step's three micro-batches, as `Timer` may."""

    def stop(run: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        run.should_stop |= batch_idx == 6

    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"logger": logger, "log_every_n_steps": 100, "accumulate_grad_batches": 3, "limit_val_batches": 1.0}
    run = trainer(tmp_path, Throughput(), LambdaCallback(on_train_batch_end=stop), **settings)
    with pytest.warns(UserWarning, match="this run has no end"):
        run.fit(MoEGPTModule(CONFIG), SyntheticData())
    with (tmp_path / "metrics.csv").open() as file:
        trained, validated = csv.DictReader(file)
    assert {trained["step"], validated["step"]} == {str(run.global_step - 1)} == {"2"}
    assert trained["train/loss"] and trained["time/step"] and validated["val/loss"]


def test_a_run_that_ends_before_its_schedule_says_so(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    decay = [LearningRateSchedule("cosine", decay_tokens=tokens) for tokens in (64, 65)]
    for settings, fits in (
        ({"train_tokens": 64, "curriculum": SequenceCurriculum(64, 8, 8)}, True),
        ({"train_tokens": 64, "schedule": decay[0]}, True),
        ({"train_tokens": 64, "curriculum": SequenceCurriculum(65, 8, 8)}, False),
        ({"train_tokens": 64, "schedule": decay[1]}, False),
    ):
        trainer(tmp_path, max_steps=1).fit(MoEGPTModule(CONFIG, **settings), SyntheticData())
        told = [str(recwarn.pop().message) for _ in range(len(recwarn))]
        assert any(re.search("is above|is below", text) for text in told) != fits


def test_accumulated_micro_batches_weigh_equally(tmp_path: Path) -> None:
    """Two micro-batches of two are one of four, where nothing depends on the micro-batch (dropless, no noise)."""
    weights = []
    for micro_batch_size, accumulate in ((4, 1), (2, 2)):
        module = MoEGPTModule(replace(DROPLESS, init_std=CONFIG.init_std), AdamWConfig(lr=1e-3))
        data = SyntheticData(micro_batch_size=micro_batch_size)
        trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate).fit(module, data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.allclose(*weights, atol=1e-5)


def test_micro_batches_of_a_step_have_the_same_losses_and_are_averaged() -> None:
    window, batch = Window(), {"tokens": torch.zeros(2, 4, dtype=torch.int64)}
    for loss in (5.0, 1.0):
        window.add(batch, {"loss": torch.tensor(loss), "own": torch.tensor(2.0)})
    assert window.read(torch.tensor(0.5), 7) == ({"loss": 3.0, "own": 2.0}, 0.5, 7)
    assert (window.samples, window.tokens) == (4, 16)
    with pytest.raises(RunError, match=r"different losses: \['loss', 'own'\] and \['loss', 'other'\]"):
        window.add(batch, {"loss": torch.tensor(1.0), "other": torch.tensor(2.0)})


def test_module_settings_all_have_an_effect(tmp_path: Path) -> None:
    def losses(**settings: Any) -> list[float]:
        recorder, module = Recorder(), MoEGPTModule(CONFIG, **settings)
        trainer(tmp_path, recorder, max_steps=3).fit(module, SyntheticData())
        assert module.gpt.activation_checkpointing == settings.get("activation_checkpointing", False)
        return recorder.losses

    plain = losses()
    assert losses(activation_checkpointing=True) == plain  # memory, not numbers
    assert losses(loss_chunk_size=3) == pytest.approx(plain, rel=1e-5)
    assert losses(seed=5) != plain
    assert losses(optimizer=AdamWConfig(lr=1e-2)) != plain
    assert losses(schedule=LearningRateSchedule("constant", warmup_tokens=1000)) != plain
    assert losses(curriculum=SequenceCurriculum(1000, 8, 8)) != plain


def test_dropout_and_routing_draw_from_seed_and_step_alone(tmp_path: Path) -> None:
    """The global generator neither decides nor notices."""
    config = GPTConfig(61, 16, 2, 32, 2, hidden_dropout=0.2, attention_dropout=0.1, moe=MoEConfig(4, noise="jitter"))
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        recorder = Recorder()
        trainer(tmp_path, recorder, max_steps=4).fit(MoEGPTModule(config), SyntheticData())
        runs.append(recorder.losses)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


def test_lower_precision_trains_to_about_the_same_loss(tmp_path: Path) -> None:
    trained, validated = {}, {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        recorder, module = Recorder(), MoEGPTModule(CONFIG, AdamWConfig(lr=1e-2))
        run = trainer(tmp_path, recorder, max_steps=30, gradient_clip_val=1.0, precision=precision)
        run.fit(module, SyntheticData())
        assert recorder.losses[0] == pytest.approx(math.log(61), abs=0.1)
        validated[precision] = run_validation(module, tmp_path, precision=precision)
        trained[precision] = sum(recorder.losses[-10:]) / 10
        weight = torch.float32 if precision != "bf16-true" else torch.bfloat16
        assert module.gpt.blocks[1].moe.experts.expand_weight.dtype == weight
        assert module.routings[0].weight.dtype == torch.float32
        assert validated[precision] == pytest.approx(validated["32-true"], rel=0.1)
        assert trained[precision] == pytest.approx(trained["32-true"], rel=0.1)
        assert trained[precision] < 0.7 * math.log(61)


def test_validation_test_and_prediction_have_the_losses_of_each_domain(tmp_path: Path) -> None:
    """Of what training counts: no padding, and not the first token of a document."""
    module, data = MoEGPTModule(CONFIG), SyntheticData(padded=True, documents=True)
    run = trainer(tmp_path, limit_val_batches=1.0)
    validated = run.validate(module, data, verbose=False)[0]
    tested = run.test(module, data, verbose=False)[0]
    predicted = torch.cat(run.predict(module, data))  # type: ignore[arg-type]
    module.eval()
    batches = list(data.val_dataloader())
    with torch.no_grad():
        losses = torch.cat([losses_of(module, batch) for batch in batches])
    counted, domain = (torch.cat([batch[name] for batch in batches]) for name in ("loss_mask", "domain"))
    even, odd = (losses[domain == number][counted[domain == number]].mean() for number in (0, 1))
    torch.testing.assert_close(predicted, losses * counted, rtol=1e-5, atol=1e-6)
    assert validated["val/loss"] == tested["test/loss"] == pytest.approx(float(losses[counted].mean()), rel=1e-5)
    assert validated["val/loss/odd"] == pytest.approx(float(odd), rel=1e-5)
    assert validated["val/bits_per_byte/even"] == pytest.approx(float(even) / math.log(2), rel=1e-5)  # 1 byte a token


def test_tokens_masked_for_the_loss_are_routed_all_the_same(tmp_path: Path) -> None:
    module, data, recorder = MoEGPTModule(DROPLESS), SyntheticData(padded=True, documents=True), Recorder()
    batch: Batch = next(iter(data.train_dataloader()))
    assert 0 < batch["loss_mask"].sum() < batch["token_mask"].sum() < batch["tokens"].numel()
    expected = losses_of(module, batch)[batch["loss_mask"]].mean()
    trainer(tmp_path, recorder, max_steps=1).fit(module, data)
    assert recorder.losses[0] == pytest.approx(expected.item(), rel=1e-6)
    (routed,) = module.routings
    assert routed.num_tokens == batch["token_mask"].sum() == routed.kept.sum()


@pytest.mark.parametrize("option", ["document", "loss_mask"])
def test_document_and_padding_marks_each_change_the_loss(option: str, tmp_path: Path) -> None:
    class Without(SyntheticData):
        def train_dataloader(self):  # type: ignore[no-untyped-def]
            for batch in super().train_dataloader():
                batch.pop(option)
                yield batch

    found = []
    for kind in (SyntheticData, Without):
        recorder = Recorder()
        trainer(tmp_path, recorder, max_steps=1).fit(MoEGPTModule(DROPLESS), kind(documents=True))
        found.append(recorder.losses)
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_an_evaluation_is_logged_at_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4)
    run.fit(MoEGPTModule(CONFIG), SyntheticData())
    run.save_checkpoint(tmp_path / "a.ckpt")
    logger = CSVLogger(tmp_path, name="", version="")
    again = trainer(tmp_path, logger=logger, limit_val_batches=1.0)
    again.validate(MoEGPTModule(CONFIG), SyntheticData(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3"]  # as training logs it, from 0


def test_module_and_data_of_an_earlier_run_are_refused(tmp_path: Path) -> None:
    module, data = MoEGPTModule(CONFIG), SyntheticData()
    trainer(tmp_path, max_steps=1).fit(module, data)
    for used in ((module, SyntheticData()), (MoEGPTModule(CONFIG), data)):
        with pytest.raises(ValueError, match="make all anew, or resume the earlier run"):
            trainer(tmp_path, max_steps=1).fit(*used)


def test_an_interval_of_validations_beyond_the_epoch_is_refused(tmp_path: Path) -> None:
    """Lightning compares the number of steps, as if it were of micro-batches, with the epoch."""
    settings = {"accumulate_grad_batches": 4, "limit_train_batches": 8, "limit_val_batches": 1.0, "max_epochs": 2}
    with pytest.raises(ValueError, match=r"val_check_interval=3 steps are 12 micro-batches, and an epoch has 8"):
        trainer(tmp_path, **settings, val_check_interval=3).fit(MoEGPTModule(CONFIG), SyntheticData())


def test_validations_are_steps_apart_also_after_dataloaders_are_reloaded(tmp_path: Path) -> None:
    steps: list[int] = []
    looks = LambdaCallback(on_validation_start=lambda run, _: steps.append(run.global_step))
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 12, "limit_val_batches": 1, "max_epochs": 2}
    settings |= {"val_check_interval": 3, "reload_dataloaders_every_n_epochs": 1}
    trainer(tmp_path, looks, **settings).fit(MoEGPTModule(CONFIG), SyntheticData())
    assert steps == [3, 6, 9, 12]


def test_training_does_not_read_the_data_of_an_evaluation_before_it(tmp_path: Path) -> None:
    evaluated, loader, saved = SyntheticData(padded=True), SyntheticData().train_dataloader(), tmp_path / "a.ckpt"
    module, run = MoEGPTModule(CONFIG), trainer(tmp_path, SaveAt(1, saved), max_steps=1, limit_val_batches=1)
    run.validate(module, datamodule=evaluated, verbose=False)
    run.fit(module, train_dataloaders=loader)
    assert evaluated.samples_consumed == 0
    resumed = trainer(tmp_path, max_steps=2, limit_val_batches=1)
    resumed.validate(MoEGPTModule(CONFIG), datamodule=SyntheticData(seq_len=8), verbose=False)
    with pytest.warns(UserWarning, match="goes on at step 1 with data that may repeat, skip or begin again"):
        resumed.fit(MoEGPTModule(CONFIG), train_dataloaders=loader, ckpt_path=saved)  # other data had been evaluated


def test_a_dataloader_without_names_of_domains_is_one_domain(tmp_path: Path) -> None:
    loader, run = SyntheticData().val_dataloader(), trainer(tmp_path, limit_val_batches=1.0)
    (found,) = run.validate(MoEGPTModule(CONFIG), loader, verbose=False)
    assert found["val/loss/all"] == found["val/loss"] == pytest.approx(run_validation(MoEGPTModule(CONFIG), tmp_path))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (partial(MoEGPTModule, CONFIG), {"train_tokens": 0}),
        (NonFinite, {"action": "ignore"}),
        (SaveCheckpoints, {"every_n_steps": 0}),
        (ExpertLoad, {"dead_window": 0}),
        (Throughput, {"peak_tflops": 0}),
        (partial(ZeroShotEval, ["piqa"]), {"limit": 0}),
    ],
)
def test_module_refuses_impossible_settings_by_name(make: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        make(**settings)
