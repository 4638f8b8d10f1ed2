"""Two lengths, the longest sequence that the model reads and those of training and evaluation; sequences that grow."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nlgmoe import MoEGPTModule
from nlgmoe.callbacks import Throughput
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.experiment import load_config, parse_config
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from tests.support.curriculum import CLOCKS, CURRICULUM, LENGTHS, Fed
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer


def test_seq_len_of_the_data_is_the_models_in_train_py_and_settable_in_load_config() -> None:
    laptop = "configs/moe/laptop.yaml"
    assert parse_config(laptop)["data"]["seq_len"] == 128
    experiment = load_config(laptop, data__seq_len=64)
    assert (experiment.data.seq_len, experiment.module.config.seq_len) == (64, 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data.seq_len=16 is above model.config.seq_len=8, the longest sequence that the model reads; lower it"),
        (
            {"config": GPTConfig(61, 64, 2, 16, 2), "curriculum": SequenceCurriculum(96, 32, 4)},
            "model.curriculum.start=32 is above data.seq_len=16; lower it",
        ),
    ],
)
def test_seq_len_that_does_not_fit_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    one = MoEGPTModule(**{"config": GPTConfig(61, 8, 2, 16, 2), **settings})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(one, SyntheticData())


def small(**settings: Any) -> MoEGPTModule:
    config = GPTConfig(61, 64, 2, 32, 2, hidden_dropout=0.1, moe=MoEConfig(4, noise="jitter"))
    schedule = LearningRateSchedule("constant", warmup_tokens=128)
    return MoEGPTModule(config, AdamWConfig(lr=1.0e-2), schedule, **{"curriculum": CURRICULUM, **settings})


def test_curriculum_grows_with_the_clock_which_counts_tokens_that_are_fed(tmp_path: Path) -> None:
    fed, speed, one, data = Fed(), Throughput(), small(), SyntheticData(micro_batch_size=2)
    validation = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    run = trainer(tmp_path, fed, speed, max_steps=6, accumulate_grad_batches=2, **validation)
    run.fit(one, data)
    assert fed.lengths[True] == [length for length in LENGTHS for _ in range(2)]  # one length in a window
    assert one.seq_len == 16 and set(fed.lengths[False]) == {16}  # the length of the data, not the model's
    assert [*fed.clocks, one.tokens_seen] == CLOCKS
    logged = run.callback_metrics  # of the one interval that ends with the run
    tokens = 1e-12 * logged["train/flops"] * logged["train/tokens_per_second"] / logged["train/tflops_per_second"]
    assert float(tokens) == pytest.approx(CLOCKS[-1])
    assert fed.rates == pytest.approx([1e-2 * min(1, clock / 128) for clock in CLOCKS[:6]])
    assert data.samples_consumed == 6 * 4  # what is cut off is not kept for later
    assert run.callback_metrics["train/seq_len"] == 16


def test_curriculum_cuts_a_batch_into_one_of_short_sequences(tmp_path: Path) -> None:
    """Padding and loss masks are cut with it: the same steps as on data that is that short."""

    class Short(SyntheticData):
        def train_dataloader(self) -> Any:
            for batch in super().train_dataloader():
                yield {name: value[:, :4] if getattr(value, "ndim", 0) == 2 else value for name, value in batch.items()}

    weights = []
    for data, curriculum in (
        (SyntheticData(padded=True, documents=True), SequenceCurriculum(10**6, 4, 4)),
        (Short(padded=True, documents=True), None),
    ):
        one = small(curriculum=curriculum)
        trainer(tmp_path, max_steps=3).fit(one, data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in one.parameters()]))
    assert torch.equal(*weights)
