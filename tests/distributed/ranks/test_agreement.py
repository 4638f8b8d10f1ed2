"""What ranks agree about: steps that are not finite, overflows, signals and errors.

A cell here is a run (`Cell` in tests/support/ranks.py) that something disturbs on one rank, and after which all ranks have
done the same. A disturbance is a job, a function that returns what each rank saw, and a line in `JOBS`.
"""

import errno
import os
import signal
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from safetensors.torch import save_file
from torch import Tensor, distributed

import nlgmoe
from nlgmoe.callbacks import SaveCheckpoints
from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.model.gpt import GPT
from nlgmoe.non_finite import NonFinite
from nlgmoe.parallel.sharded_checkpoint import LOSS_SCALE_KEYS
from nlgmoe.pyramid import ExpertPlacement
from tests.support.cells import DROPLESS, LEARNS, PLAIN
from tests.support.jobs import Found, Jobs, allow_fp16, error_of, saves_at_start
from tests.support.non_finite import Spoils, Undo
from tests.support.ranks import SAMPLES, Cell, on_ranks, train

SPOILT = Cell("skip, ZeRO 1, accumulation", 2, 1, accumulate=2, moe=DROPLESS, non_finite=NonFinite("skip"))
OVERFLOW = Cell("overflow", 2, 1, precision="16-mixed", moe=DROPLESS, steps=4, options={"hysteresis": 1})


class SpoilsExpert(Spoils):
    """Makes expert 2 of block 1 NaN or infinite on the last rank, in the third step: its gradient, or its output.

    Attributes:
        clocks: tokens seen, and the sum of all weights' magnitudes here, before each step and at the end.
    """

    def __init__(self, value: float = torch.nan, output: bool = False) -> None:
        super().__init__({2}, partial(spoil_expert, value=value, output=output))
        self.clocks: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._look(pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._look(pl_module)

    def _look(self, module: Any) -> None:
        weight = sum(float(parameter.detach().double().abs().sum()) for parameter in module.parameters())
        self.clocks.append((module.tokens_seen, weight))

    def logs(self, name: str) -> list[float]:
        return [logged[name] for logged in self.logged]


def spoil_expert(gpt: GPT, tokens: Tensor, value: float, output: bool) -> Undo:
    if distributed.is_initialized() and distributed.get_rank() < distributed.get_world_size() - 1:
        return lambda: None
    experts = gpt.blocks[1].moe.experts
    if output:
        return experts.register_forward_hook(lambda module, inputs, output: output * value).remove
    spoil = torch.zeros_like(experts.down_weight)
    spoil[2 - experts.first] = value
    return experts.down_weight.register_hook(lambda gradient: gradient + spoil).remove


def overflow(cell: Cell, ranks: int, folder: Path) -> tuple[Any, ...]:
    """Steps of fp16 whose third overflows on the last rank.

    Returns:
        The loss scale and `SpoilsExpert.clocks` of each step, the scale's states at a save and in its resume, and the error of
        a run whose scale cannot fall any further.
    """
    allow_fp16()
    spoils, scales, end = SpoilsExpert(torch.inf), list[float](), folder / f"{cell.name} at the end.ckpt"

    def note(trainer: Trainer, *_: Any) -> None:
        scales.append(float(trainer.strategy.deepspeed_engine.optimizer.loss_scaler.cur_scale))

    on_ranks(cell, ranks, folder, spoils, LambdaCallback(on_train_batch_start=note))
    states, again = [Checkpoint(end).document["loss_scale"]], folder / f"{cell.name} again.ckpt"
    on_ranks(replace(cell, steps=cell.steps + 1), ranks, folder, saves_at_start(again), checkpoint=end)
    states.append(Checkpoint(again).document["loss_scale"])
    lowest = replace(cell, options=cell.options | {"min_loss_scale": 2**11})
    error = error_of(lambda: on_ranks(lowest, ranks, folder, SpoilsExpert(torch.inf)))
    return scales, spoils.clocks, states, error


def spoilt(cell: Cell, ranks: int, folder: Path) -> tuple[Any, ...]:
    """A run that skips its third step, and one that stops there: losses, what `SpoilsExpert` saw, and the error."""
    skips = SpoilsExpert()
    outcome = on_ranks(cell, ranks, folder, skips)
    error = error_of(lambda: on_ranks(replace(cell, non_finite=NonFinite()), ranks, folder, SpoilsExpert(output=True)))
    return outcome.losses, skips.clocks, skips.logs("train/grad_norm"), skips.logs("train/skipped_steps")[-1], error


def interrupted(cell: Cell, ranks: int, folder: Path) -> tuple[int, int, list[float]]:
    """Exit code and saved step of a run that gets SIGTERM on rank 1 alone in its third step, and its losses when resumed."""

    def tell(trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    where, code = folder / f"{cell.name} interrupted", -1
    try:
        on_ranks(cell, ranks, where, LambdaCallback(on_before_backward=tell), SaveCheckpoints())
    except SystemExit as end:
        code = int(end.code or 0)
    path = where / "checkpoints/last.ckpt"
    step = Checkpoint(path).document["global_step"]
    return code, step, on_ranks(cell, ranks, where, checkpoint=path).losses


def disk_full(cell: Cell, ranks: int, folder: Path) -> tuple[str, list[str]]:
    """The error of a save for which rank 1 has no room, and problems of the checkpoint that it was to replace."""
    where, errors = folder / "full disk", list[str]()
    path = where / "full.ckpt"

    def write(entries: dict[str, Tensor], file: Path) -> None:
        if distributed.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(entries, file)

    def save(trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(path)
        with mock.patch.object(writing, "save_file", write):
            errors.append(error_of(lambda: trainer.save_checkpoint(path)))

    on_ranks(cell, ranks, where, LambdaCallback(on_train_start=save))
    return errors[0], [*find_problems(Checkpoint(path)), *(path.name for path in where.glob(".*"))]


JOBS: Jobs = {
    2: [(on_ranks, LEARNS), (interrupted, LEARNS), (spoilt, SPOILT), (overflow, OVERFLOW), (disk_full, PLAIN)]
}


def test_overflow_changes_scale_and_clock_alone_and_ends_a_run_at_the_lowest_scale(found: Found) -> None:
    for scales, clocks, states, error in found[overflow, OVERFLOW.name]:
        assert scales == [2.0**11, 2.0**11, 2.0**11, 2.0**10]
        tokens, weights = zip(*clocks, strict=True)
        assert tokens == tuple(SAMPLES * 16 * step for step in range(5))
        assert [before == after for before, after in pairwise(weights)] == [False, False, True, False]
        assert states[0] == states[1] and states[0]["last_overflow_iter"] == 2
        assert set(states[0]) == set(LOSS_SCALE_KEYS)
        where = "first not finite: the gradient of blocks.1.moe.experts.down_weight on rank 1"
        assert error.startswith(f"step 2: the gradient norm is inf; {where}")


def test_bad_expert_of_one_rank_makes_all_ranks_stop_or_skip(found: Found, tmp_path: Path) -> None:
    alone = SpoilsExpert()
    expected = train(SPOILT, 1, tmp_path, SAMPLES, SPOILT.accumulate, alone)
    for losses, clocks, norms, skipped, error in found[spoilt, SPOILT.name]:
        assert losses == pytest.approx(expected.losses, rel=1e-5)
        others = [(norms[step], alone.logs("train/grad_norm")[step]) for step in (0, 1, 3, 4, 5)]  # the spoilt is 2
        assert all(norm == pytest.approx(wanted, rel=1e-4) for norm, wanted in others)
        tokens, weights = zip(*clocks, strict=True)
        assert tokens == tuple(SAMPLES * 16 * SPOILT.accumulate * step for step in range(7))
        assert [before == after for before, after in pairwise(weights)] == [step == 2 for step in range(6)]
        assert skipped == alone.logs("train/skipped_steps")[-1] == 1
        assert error.startswith("step 2: the loss is nan; first not finite: the loss on all ranks;")  # all use it


def test_signal_to_one_rank_ends_all_after_the_same_step(found: Found) -> None:
    for rank, (code, saved, resumed) in enumerate(found[interrupted, LEARNS.name]):
        assert (code, saved) == (0, 3)
        assert resumed == pytest.approx(found[on_ranks, LEARNS.name][rank].losses[3:], rel=1e-6)


def test_disk_full_on_one_rank_is_named_by_both_and_leaves_the_checkpoint_before(found: Found) -> None:
    for error, problems in found[disk_full, PLAIN.name]:
        assert error.startswith("rank 1: the checkpoint ") and "No space left" in error and "make room" in error
        assert not problems


def test_a_parameter_that_a_callback_has_frozen_is_refused_by_name() -> None:
    module = nlgmoe.MoEGPTModule(nlgmoe.GPTConfig(61, 16, 2, 16, 2))
    module.gpt.final_norm.requires_grad_(False)  # as a callback may do
    (strategy := nlgmoe.ExpertParallelStrategy()).connect(module)
    with pytest.raises(ValueError, match=r"requires_grad of final_norm\.\w+ is False; train on one process or"):
        strategy.on_train_start()


def test_a_module_that_was_built_with_other_placements_is_refused() -> None:
    module = nlgmoe.MoEGPTModule(nlgmoe.GPTConfig(61, 16, 2, 16, 2, moe=nlgmoe.MoEConfig(4)))
    assert module.gpt is not None  # built with all experts
    placed = {1: ExpertPlacement(0, 2, group=object())}
    strategy = SimpleNamespace(expert_placements=lambda config: placed)
    module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="make a new MoEGPTModule for every trainer"):
        module.configure_model()
