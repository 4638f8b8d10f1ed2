"""MoEGPTModule under Lightning: the loss and what counts in it, token clock, learning rate, evaluation by domain."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F

from nlgmoe.batch import Batch
from nlgmoe.callbacks import SaveCheckpoints, Throughput
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.sampling import collate
from nlgmoe.layers.balance import router_losses
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from tests.support.commands import rows_of
from tests.support.synthetic import Samples, SyntheticData
from tests.support.trainers import CONFIG, Recorder, SaveAt, trainer

DROPLESS = GPTConfig(61, 16, 2, 32, 2, init_std=0.2, moe=MoEConfig(4, token_dropping=False, loss_coeff=0.0))


def test_gradients_are_freed_when_a_step_ends(tmp_path: Path) -> None:
    """The next forward pass would add its activations to them."""
    freed: list[bool] = []

    def look(trainer: Trainer, module: MoEGPTModule, *_: Any) -> None:
        freed.append(all(parameter.grad is None for parameter in module.parameters()))

    callback = LambdaCallback(on_train_batch_end=look)
    trainer(tmp_path, callback, max_steps=2, accumulate_grad_batches=2).fit(MoEGPTModule(CONFIG), SyntheticData())
    assert freed == [False, True] * 2


def test_the_loss_is_cross_entropy_plus_weighted_router_losses(tmp_path: Path) -> None:
    module, data, recorder = MoEGPTModule(CONFIG, loss_chunk_size=7, seed=5), SyntheticData(), Recorder()
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
    assert MoEGPTModule(CONFIG, activation_checkpointing=True).gpt.activation_checkpointing


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


def test_a_run_ends_with_a_whole_step_that_is_logged_and_validated(tmp_path: Path) -> None:
    """Also if a callback asks for the end at the first of a step's three micro-batches, as `Timer` may."""

    def stop(run: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        run.should_stop |= batch_idx == 6

    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"logger": logger, "log_every_n_steps": 100, "accumulate_grad_batches": 3, "limit_val_batches": 1.0}
    run = trainer(tmp_path, Throughput(), LambdaCallback(on_train_batch_end=stop), **settings)
    with pytest.warns(UserWarning, match="this run has no end"):
        run.fit(MoEGPTModule(CONFIG), SyntheticData())
    trained, validated = rows_of(tmp_path / "metrics.csv")
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


def test_dropout_and_routing_draw_from_seed_and_step_alone(tmp_path: Path) -> None:
    """The global generator neither decides nor notices."""
    config = GPTConfig(61, 16, 2, 32, 2, hidden_dropout=0.2, attention_dropout=0.1, moe=MoEConfig(4, noise="jitter"))
    runs = []
    for global_seed, seed in ((1, 1234), (2, 1234), (2, 5)):
        torch.manual_seed(global_seed)
        recorder = Recorder()
        trainer(tmp_path, recorder, max_steps=4).fit(MoEGPTModule(config, seed=seed), SyntheticData())
        runs.append(recorder.losses)
    assert runs[0] == runs[1] and not set(runs[0]) & set(runs[2])
    assert len(set(runs[0])) == 4
    weights, others = (MoEGPTModule(config, seed=seed).gpt.unembedding for seed in (1234, 5))
    assert not torch.equal(weights, others)


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


def test_an_evaluation_is_logged_at_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4)
    run.fit(MoEGPTModule(CONFIG), SyntheticData())
    run.save_checkpoint(tmp_path / "a.ckpt")
    logger = CSVLogger(tmp_path, name="", version="")
    again = trainer(tmp_path, logger=logger, limit_val_batches=1.0)
    again.validate(MoEGPTModule(CONFIG), SyntheticData(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["3"]  # as training logs it, from 0


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


class Stateful:
    """As torchdata's `StatefulDataLoader`, goes on in the next pass where its state is, and then begins anew."""

    def __init__(self) -> None:
        self._samples, self._first, self._taken = Samples(61, 16, 0, 100), 0, 0

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first, self._first = self._first % 12, 0
        for self._taken in range(first + 1, 13):
            yield collate([self._samples[2 * self._taken + number] for number in range(2)])

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["taken"]


def test_own_dataloader_resumes_with_what_is_left_of_the_epoch(tmp_path: Path) -> None:
    """But for a micro-batch that the loader had handed out when it was saved, as a line says."""

    def fit(name: str, resume: Path | None = None) -> int:
        keeper = SaveCheckpoints(every_n_steps=1, keep=100, monitor=None)
        run = trainer(tmp_path / name, keeper, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=True)
        run.fit(MoEGPTModule(CONFIG), Stateful(), ckpt_path=resume)
        return run.global_step

    assert fit("whole") == 12
    with pytest.warns(UserWarning, match="goes on at step 4 with data that may repeat, skip or begin again"):
        assert fit("rest", tmp_path / "whole/checkpoints/step-4.ckpt") in (11, 12)
    assert fit("end", tmp_path / "whole/checkpoints/step-12.ckpt") == 12
