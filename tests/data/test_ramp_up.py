"""A batch that grows: its sizes, that they are of the same samples on any ranks, and that a run goes on in the middle."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from nlgmoe import PileDataModule
from nlgmoe.data.accumulation import BatchRampUp, batch_size_after
from tests.data.test_accumulation import fit
from tests.data.test_datamodule import batches, rows

Make = Callable[..., PileDataModule]
# 12 sequences in the end, 4 at first, 4 more every 16 sequences of 32 tokens.
RAMP_UP = BatchRampUp(start=4, increment=4, tokens=2 * 16 * 32)
SIZES = [4, 4, 4, 4, 8, 8, 12, 12]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [  # --rampup-batch-size 32 32 1953125 --global-batch-size 512: 15 increments, one every 130,208.33 samples
        (0, 32),
        (130_208, 32),
        (130_209, 64),
        (976_562, 256),
        (976_563, 256),
        (1_041_667, 288),
        (1_953_124, 480),
        (1_953_125, 512),
        (10**9, 512),
    ],
)
def test_the_published_ramp_up_of_1_3b(samples: int, expected: int) -> None:
    ramp_up = BatchRampUp(32, 32, 1_953_125 * 2048)
    assert batch_size_after(samples, 2048, 512, ramp_up) == expected
    assert batch_size_after(samples, 2048, 512, None) == 512


def steps(data: PileDataModule, micro_batches: int, count: int, world_size: int) -> list[list[list[int]]]:
    """The rows of each of the next `count` steps, in the order of their samples."""
    by_rank = [batches(data, count * micro_batches, rank, world_size) for rank in range(world_size)]
    return [
        [row for index in range(micro_batches) for rank in by_rank for row in rows(rank[step * micro_batches + index])]
        for step in range(count)
    ]


def test_without_a_global_size_a_step_is_what_the_trainer_accumulates(make_data: Make) -> None:
    data = make_data(micro_batch_size=3)
    assert data.batch_size_after(0) == 3
    data.trainer = Trainer(accumulate_grad_batches=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert data.batch_size_after(0) == 12


@pytest.mark.parametrize(
    ("micro_batch_size", "world_size", "micro_batches"), [(12, 1, 1), (6, 1, 2), (3, 4, 1), (3, 2, 2)]
)
def test_steps_are_the_same_on_any_ranks(
    make_data: Make, micro_batch_size: int, world_size: int, micro_batches: int
) -> None:
    straight = [row for batch in batches(make_data(micro_batch_size=1), sum(SIZES)) for row in rows(batch)]
    data = make_data(micro_batch_size=micro_batch_size, global_batch_size=12, batch_ramp_up=RAMP_UP)
    found = steps(data, micro_batches, len(SIZES), world_size)
    assert [len(step) for step in found] == SIZES
    assert [row for step in found for row in step] == straight


def test_a_run_killed_on_the_way_up_goes_on_with_the_same_steps_on_other_ranks(make_data: Make) -> None:
    options: dict[str, Any] = {"global_batch_size": 12, "batch_ramp_up": RAMP_UP}
    whole = steps(make_data(micro_batch_size=3, **options), 4, len(SIZES), 1)
    killed = make_data(micro_batch_size=3, num_workers=1, **options)
    batches(killed, 9 * 4)  # workers have loaded ahead, past the end of the ramp-up
    for size in SIZES[:5]:
        assert killed.planned_batch_size() == size
        killed.advance(size)
    resumed = make_data(micro_batch_size=3, **options)
    resumed.load_state_dict(killed.state_dict())
    assert resumed.planned_batch_size() == 8
    assert steps(resumed, 2, 3, 2) == whole[5:]


def test_training_takes_the_planned_steps_and_its_clocks_follow(make_data: Make, tmp_path: Path) -> None:
    """Six steps, saved, and two more with smaller micro-batches; nothing to warn about, but these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a step had .* sequences")
        data = make_data(micro_batch_size=6, global_batch_size=12, batch_ramp_up=RAMP_UP)
        assert fit(tmp_path, data, 6).steps == [0, 2, 4, 6, 8, 10, 12]
        assert data.samples_consumed == sum(SIZES[:6])
        resumed = make_data(micro_batch_size=3, global_batch_size=12, batch_ramp_up=RAMP_UP)
        assert fit(tmp_path, resumed, 8, tmp_path / "end.ckpt").steps == [0, 4, 8]
    assert resumed.samples_consumed == sum(SIZES)
    assert resumed.trainer is not None
    assert resumed.trainer.lightning_module.tokens_seen == sum(SIZES) * 32
    with pytest.warns(
        UserWarning, match="a step had 12 sequences .*, now it has 4; data.global_batch_size=12 keeps it"
    ):
        fit(tmp_path, make_data(micro_batch_size=4, global_batch_size=4), 9, tmp_path / "end.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": None}, "^global_batch_size=null: batch_ramp_up has no batch to grow to; set it$"),
        ({"global_batch_size": 2}, "^start=4 is above global_batch_size=2; lower it$"),
        (
            {"global_batch_size": 18, "micro_batch_size": 9},
            "^start=4 does not reach global_batch_size=18 by increment=4; change one of them$",
        ),
        (
            {"micro_batch_size": 2},
            "^start=4 must be a multiple of the 6 micro-batches that make up global_batch_size=12 with micro_batch_size=2; "
            "change one of them$",
        ),
        (
            {"batch_ramp_up": BatchRampUp(6, 3, 9), "micro_batch_size": 2},
            "^increment=3 must be a multiple of the 6 ",
        ),
    ],
)
def test_what_cannot_be_made_up_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PileDataModule(**{"global_batch_size": 12, "batch_ramp_up": RAMP_UP, "micro_batch_size": 3} | options)


@pytest.mark.parametrize("name", ["start", "increment", "tokens"])
def test_nothing_grows_by_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=0 must be at least 1$"):
        BatchRampUp(**{"start": 1, "increment": 1, "tokens": 1} | {name: 0})


@pytest.mark.parametrize(("train_tokens", "warns"), [(8, True), (9, False), (None, False)])
def test_a_ramp_that_is_longer_than_training_is_said(make_data: Make, train_tokens: int | None, warns: bool) -> None:
    data = make_data(global_batch_size=12, micro_batch_size=3, batch_ramp_up=BatchRampUp(4, 4, 9))
    module = SimpleNamespace(train_tokens=train_tokens)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module, accumulate_grad_batches=1, global_rank=0, world_size=1
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data.setup("fit")
    assert ["batch_ramp_up.tokens=9 is above model.train_tokens=8" in str(one.message) for one in said] == [
        True
    ] * warns
