"""Checkpoints on ranks: resumed in other topologies, and started from.

A cell here is a run (`Cell` in tests/support/ranks.py) of the model `RESIDUAL_PYRAMID` in some topology, which resumes the
checkpoint that one process has saved (the fixture `checkpoint`). To add one, add it to `TOPOLOGIES` under its number of
ranks, or to `THROUGH_HALF` if only its weights are compared.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.module import MoEGPTModule
from nlgmoe.surgery.warm_start import WarmStart
from tests.support.cells import ALONE, RESIDUAL_PYRAMID
from tests.support.jobs import Found, Jobs, assert_equal, cases, saves_at_start, with_state
from tests.support.ranks import SAMPLES, Cell, Outcome, assert_close, make_trainer, on_ranks, train
from tests.support.synthetic import SyntheticData

# One checkpoint, saved by one process after three steps, goes on in each of these.
TOPOLOGIES: dict[int, list[Cell]] = {
    2: [
        Cell("2 ranks, degree 1, offload", 1, 1, options={"offload_optimizer": True}, **RESIDUAL_PYRAMID),
        Cell("2 ranks, ddp", strategy="ddp", **RESIDUAL_PYRAMID),
    ],
    3: [Cell("3 ranks, degree 3, ZeRO 1", 3, 1, **RESIDUAL_PYRAMID)],
    4: [Cell("4 ranks, degree 4, ZeRO 2", 4, 2, **RESIDUAL_PYRAMID)],
}
# The same checkpoint, there and back, where weights are bf16 and the optimizer has fp32 ones.
THROUGH_HALF = [
    Cell(f"through {precision}, ZeRO {stage}", 2, stage, precision=precision, steps=4, **RESIDUAL_PYRAMID)
    for precision, stage in (("bf16-mixed", 2), ("bf16-true", 1))
]
WARM = Cell("warm start, bf16-mixed", 2, 1, steps=1, precision="bf16-mixed", **RESIDUAL_PYRAMID)


def resume(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> Outcome:
    """Go on from a checkpoint, after saving it again as `CELL.ckpt`."""
    callbacks = [saves_at_start(folder / f"{cell.name}.ckpt"), *with_state(folder / cell.name)]
    return on_ranks(cell, ranks, folder, *callbacks, checkpoint=checkpoint)


def warm_start(cell: Cell, ranks: int, folder: Path, checkpoint: Path) -> dict[str, float]:
    """Losses of a new run from a checkpoint's weights at its start and end, and of its own weights, saved alone.

    `CELL warm.ckpt` is the new run before its first step, `CELL weights.ckpt` its weights after one.
    """

    def evaluated(module: MoEGPTModule, path: Path | None = None) -> float:
        trainer = make_trainer(cell, ranks, folder)
        return trainer.validate(module, SyntheticData(), ckpt_path=path, verbose=False)[0]["val/loss"]

    def warm() -> MoEGPTModule:
        module = cell.module()
        module.warm_start = WarmStart(str(checkpoint))
        return module

    fit = make_trainer(cell, ranks, folder, saves_at_start(folder / f"{cell.name} warm.ckpt"))
    fit.fit(warm(), SyntheticData(micro_batch_size=SAMPLES // ranks))
    path = folder / f"{cell.name} weights.ckpt"
    fit.save_checkpoint(path, weights_only=True)
    trained = float(fit.callback_metrics["val/loss"])
    return {"start": evaluated(warm()), "end": trained, "from weights": evaluated(cell.module(), path)}


JOBS: Jobs = {ranks: [(resume, cell) for cell in cells] for ranks, cells in TOPOLOGIES.items()}
JOBS[2] += [(resume, cell) for cell in THROUGH_HALF] + [(warm_start, WARM)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process from the first step to the last."""
    return train(ALONE, 1, tmp_path_factory.mktemp("undisturbed"), SAMPLES, 1)


@cases(TOPOLOGIES)
def test_checkpoint_resumes_in_any_topology_which_saves_what_one_process_saves(
    ranks: int, cell: Cell, found: Found, checkpoint: Path, undisturbed: Outcome
) -> None:
    for outcome in found[resume, cell.name]:
        assert outcome.losses == pytest.approx(undisturbed.losses[3:], rel=1e-5)
        assert outcome.validation == pytest.approx(undisturbed.validation, rel=1e-5)
        experts = [name for name in undisturbed.metrics if name.startswith("experts/")]
        assert len(experts) >= 2 * 12  # of an interval that began before
        for name in experts:
            assert outcome.metrics[name] == pytest.approx(undisturbed.metrics[name], rel=1e-3, abs=1e-6), name

    again = checkpoint.parent / str(ranks) / f"{cell.name}.ckpt"  # saved before the first step
    assert_equal(again, checkpoint)
    if cell.strategy == "expert_parallel":  # each rank has written a part, about as much as the others
        for kind in ("model", "optimizer"):
            sizes = [file.stat().st_size for file in again.glob(f"{kind}*")]
            assert len(sizes) == ranks and max(sizes) < 1.5 * min(sizes)

    ours, theirs = checkpoint.parent / str(ranks) / cell.name / "step=5.ckpt", checkpoint.with_name("step=5.ckpt")
    moments = [("optimizer", moment, 2e-6) for moment in ("exp_avg/", "exp_avg_sq/")]
    for kind, moment, tolerance in (("model", "", 1e-6), *moments):
        files = [Checkpoint(path).tensors(kind) for path in (ours, theirs)]
        assert files[0].shapes == files[1].shapes
        names = [name for name in files[1].shapes if name.startswith(moment)]
        tensors = [{name: without_noise(name, file.read(name)) for name in names} for file in files]
        assert_close(*tensors, tolerance)
    (mine, losses), (other, expected) = rest_of(ours), rest_of(theirs)
    assert mine == other
    assert losses == pytest.approx(expected, rel=1e-5)


def without_noise(name: str, value: torch.Tensor) -> torch.Tensor:
    """Without the keys' bias: its gradient is nothing but rounding (softmax does not see it), which Adam amplifies."""
    if name.endswith("attention.qkv.bias"):
        queries, _, values = value.chunk(3)
        return torch.cat([queries, values])
    return value


def rest_of(path: Path) -> tuple[dict[str, Any], list[float]]:
    """A checkpoint's `checkpoint.json` without what measures time, and the losses that are in it."""
    document = json.loads((path / "checkpoint.json").read_text().replace(str(path.parent), "FOLDER"))
    summary = document["callbacks"]["RunSummary"]
    seconds = document["clock"].pop("seconds")
    assert seconds["run"] > seconds["steps"] > 0 and seconds["validation"] >= 0
    document.pop("saved_at")
    assert document.pop("step_size")["samples"] == SAMPLES
    document.pop("loss_scale", None)
    return document, summary.pop("losses")


@pytest.mark.parametrize("cell", THROUGH_HALF, ids=lambda cell: cell.name)
def test_fp32_weights_survive_half_precision(cell: Cell, found: Found, checkpoint: Path) -> None:
    assert found[resume, cell.name]
    assert_equal(checkpoint.parent / "2" / f"{cell.name}.ckpt", checkpoint)


def test_warm_start_on_ranks_has_the_weights_of_one_process(found: Found, checkpoint: Path) -> None:
    warm, weights = (checkpoint.parent / "2" / f"{WARM.name} {name}.ckpt" for name in ("warm", "weights"))
    new, original = (Checkpoint(path).tensors("model") for path in (warm, checkpoint))
    assert new.shapes == original.shapes
    assert all(torch.equal(new.read(name), original.read(name)) for name in original.shapes)
    assert len(list(weights.glob("model-*"))) == 2 and not list(weights.glob("optimizer*"))
    trainer = make_trainer(ALONE, 1, checkpoint.parent)
    expected = trainer.validate(ALONE.module(), SyntheticData(), ckpt_path=checkpoint, verbose=False)[0]["val/loss"]
    for rank in found[warm_start, WARM.name]:
        assert rank["start"] == pytest.approx(expected, rel=1e-2)  # bf16
        assert rank["from weights"] == pytest.approx(rank["end"], rel=1e-6)
