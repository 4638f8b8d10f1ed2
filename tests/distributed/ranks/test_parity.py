"""The same numbers on 1, 2, 3 or 4 ranks, at every expert-parallel degree and ZeRO stage: losses, gradients, metrics, clocks.

Parity means: dropless, global statistics, no noise: N ranks equal one process with the whole batch. Where ranks route for
themselves (capacity, `aux_scope: rank`): N ranks equal one process that accumulates the N micro-batches.

A cell is one setting of a run (`Cell` in tests/support/ranks.py), for one choice that ranks could get wrong. To add one, add a
line to `CELLS` in tests/support/cells.py under its number of ranks; nothing else. What needs a job of its own is a function and
a cell here, a line in `JOBS`, and a test.
"""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import distributed

from nlgmoe.checkpoint.entries import split_experts
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data import BatchRampUp, PileDataModule
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.roles import component_of
from tests.support.cells import CELLS, DROPLESS, FROZEN
from tests.support.jobs import Found, Jobs, cases
from tests.support.ranks import Cell, Recorder, alone, assert_close, make_trainer, on_ranks
from tests.support.synthetic import ToLongest

UNEVEN = CELLS[3][0]  # 20 windows over 3 ranks, in batches of 3
UNEQUAL = Cell("unequal", 2, 1, moe=DROPLESS, steps=20)
GROWING = Cell("growing", 2, moe=DROPLESS, steps=9)
TEXT = Path(__file__).parents[3] / "data" / "pocket_pile"  # where the fixture `pocket_pile` builds it


def evaluate_text(cell: Cell, ranks: int, folder: Path) -> dict[str, float]:
    """All that `validate` and `test` say of an untrained model on 20 windows of text."""
    config = GPTConfig(4096, 16, cell.layers, 32, 2, init_std=0.05, moe=MoEConfig(cell.experts, **cell.moe))
    data = PileDataModule(str(TEXT), "pocket-4k", micro_batch_size=3, seq_len=16, max_eval_windows=5)
    data.global_batch_size = 3  # which no step on several ranks could have: evaluation has no steps

    trainer = make_trainer(cell, ranks, folder / "evaluated")
    (validated,) = trainer.validate(MoEGPTModule(config), data, verbose=False)
    (tested,) = trainer.test(MoEGPTModule(config), data, verbose=False)
    return {**validated, **tested}


def growing(cell: Cell, ranks: int, folder: Path) -> tuple[list[float], list[int], int, float]:
    """A run on text whose batch grows from 4 sequences to 12, in two micro-batches, and whose sequences from 4 tokens to 16.

    Returns:
        Losses and numbers of sequences of each step, and the clock and the learning rate at the end.
    """
    config = GPTConfig(4096, 16, cell.layers, 32, 2, init_std=0.05, moe=MoEConfig(cell.experts, **cell.moe))
    schedule = LearningRateSchedule("constant", warmup_tokens=500)
    module = MoEGPTModule(config, AdamWConfig(lr=3e-3), schedule, curriculum=SequenceCurriculum(300, 4, 4))
    ramp_up = BatchRampUp(4, 4, 32 * 16)
    batches = {"micro_batch_size": 6 // ranks, "global_batch_size": 12, "batch_ramp_up": ramp_up, "seq_len": 16}
    data = PileDataModule(str(TEXT), "pocket-4k", **batches, max_eval_windows=3)
    consumed = [0]
    count = LambdaCallback(on_train_batch_end=lambda *_: consumed.append(data.samples_consumed))
    trainer = make_trainer(cell, ranks, folder, recorder := Recorder(), count, accumulate_grad_batches=2)
    trainer.fit(module, data)
    sequences = [after - before for before, after in pairwise(consumed) if after > before]
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    return recorder.outcome.losses, sequences, module.tokens_seen, rate


def uneven(cell: Cell, ranks: int, folder: Path) -> tuple[int, int, int, float]:
    """Steps, clock, positions fed to all ranks, and learning rate after 400 tokens of batches that differ between ranks."""
    module, fed = cell.module(), torch.zeros((), dtype=torch.int64)
    module.train_tokens, module.schedule = 400, LearningRateSchedule("cosine", 0.0, 0, 1000)

    count = LambdaCallback(on_train_batch_start=lambda trainer, module, batch, _: fed.add_(batch["tokens"].numel()))
    trainer = make_trainer(cell, ranks, folder, count, accumulate_grad_batches=2)
    trainer.fit(module, ToLongest(micro_batch_size=2, padded=True))
    distributed.all_reduce(fed)
    return trainer.global_step, module.tokens_seen, int(fed), trainer.optimizers[0].param_groups[0]["lr"]


JOBS: Jobs = {ranks: [(on_ranks, cell) for cell in cells] for ranks, cells in CELLS.items()}
JOBS[2] += [(uneven, UNEQUAL), (growing, GROWING)]
JOBS[3] += [(evaluate_text, UNEVEN)]


@cases(CELLS)
def test_ranks_compute_what_one_process_computes(
    ranks: int, cell: Cell, found: Found, checkpoint: Path, tmp_path: Path
) -> None:
    expected, outcomes = alone(cell, ranks, tmp_path), found[on_ranks, cell.name]
    norms = expected.norms
    assert min(norms) > cell.clip
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.validation == pytest.approx(expected.validation, rel=1e-5)
        experts = [name for name in expected.metrics if name.startswith(("experts/", "train/grad_norm"))]
        assert len(experts) >= 2 * 9
        for name in experts:
            assert outcome.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-3, abs=1e-6), name
        assert outcome.metrics.keys() == expected.metrics.keys()
        assert outcome.metrics["train/flops"] == expected.metrics["train/flops"]
        if cell.strategy == "expert_parallel":
            assert outcome.clip_norms[:5] == pytest.approx(norms[:5], rel=1e-5)
            assert outcome.clip_norms == pytest.approx(norms, rel=1e-3)  # Adam has amplified some rounding by then
    gradients = {name: value for outcome in outcomes for name, value in outcome.gradients.items()}
    assert_close(gradients, expected.gradients, 1e-5)
    ends = [folder / f"{cell.name} at the end.ckpt" for folder in (tmp_path, checkpoint.parent / str(ranks))]
    first, other = (
        {name: files.read(name) for name in files.shapes if not name.startswith("step")}
        for files in (Checkpoint(end).tensors("optimizer") for end in ends)
    )
    buffers = [
        {name: files.read(name) for name in files.shapes if ".router." in name and not name.endswith("weight")}
        for files in (Checkpoint(end).tensors("model") for end in ends)
    ]
    assert buffers[0].keys() == buffers[1].keys() and bool(buffers[0]) == ("router" in cell.moe)
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    # Later steps amplify rounding where a gradient is nothing but rounding; moments as a whole stay close.
    assert_close(other, first, 1e-3)


@pytest.mark.parametrize("cell", FROZEN, ids=lambda cell: cell.name)
def test_frozen_weights_of_every_rank_stay_as_they_were(cell: Cell, found: Found, checkpoint: Path) -> None:
    assert found[on_ranks, cell.name]
    first, end = split_experts(cell.module().gpt.state_dict()), checkpoint.parent / "2" / f"{cell.name} at the end.ckpt"
    files = Checkpoint(end).tensors("model")
    for name, value in first.items():
        assert torch.equal(files.read(name), value) == (component_of(name) in cell.frozen), name
    assert list(find_problems(Checkpoint(end))) == []


def test_evaluation_with_uneven_last_batches_equals_one_process(found: Found, tmp_path: Path) -> None:
    expected = evaluate_text(UNEVEN, 1, tmp_path)
    for rank in found[evaluate_text, UNEVEN.name]:
        assert rank == pytest.approx(expected, rel=1e-5)


def test_batches_and_sequences_grow_alike_on_ranks(found: Found, tmp_path: Path) -> None:
    losses, sequences, tokens, rate = growing(GROWING, 1, tmp_path)
    assert sequences == [4, 4, 4, 4, 8, 8, 12, 12, 12]
    # Lengths 4 at clocks 0, 16, 32 and 48, 4 at 64, 4 at 96, 8 at 128, 12 at 224, 16 at 368.
    assert tokens == 4 * (4 * 4) + 2 * (8 * 4) + 12 * 8 + 12 * 12 + 12 * 16
    assert rate == 3e-3
    for of_rank, *others in found[growing, GROWING.name]:
        assert others == [sequences, tokens, rate]
        assert of_rank == pytest.approx(losses, rel=1e-5)


def test_the_clock_counts_the_tokens_of_all_ranks(found: Found) -> None:
    (steps, clock, fed, rate), other = found[uneven, UNEQUAL.name]
    assert (steps, clock, fed, rate) == other
    assert 400 <= clock == fed and 2 < steps < UNEQUAL.steps
    assert rate == pytest.approx(3e-3 * (1 + math.cos(math.pi * clock / 1000)) / 2)
