"""The same numbers on 1, 2, 3 or 4 ranks, at every expert-parallel degree and ZeRO stage.

Parity means: dropless, global statistics, no noise: N ranks equal one process with the whole batch. Where ranks route for
themselves (capacity, `aux_scope: rank`): N ranks equal one process that accumulates the N micro-batches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hash_router import HashRouterConfig

import nlgmoe
from nlgmoe.callbacks import ExpertLoad
from nlgmoe.checkpoint.entries import split_experts
from nlgmoe.checkpoint.portable import load_model
from nlgmoe.checkpoint.reading import TensorFiles
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.hardware import hardware
from nlgmoe.non_finite import NonFinite
from nlgmoe.optim.param_groups import is_frozen
from nlgmoe.parallel.sharded_checkpoint import LOSS_SCALE_KEYS
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.topology import Topology
from tests.distributed.cells import (
    Spoils,
    Taught,
    assert_equal,
    engine_facts,
    evaluate_text,
    growing,
    interrupted,
    learn,
    overflow,
    refused,
    resume,
    run_all,
    save_large,
    specialised,
    spoilt,
    taught,
    taught_offline,
    taught_on,
    traffic,
    typed,
    uneven,
    warm_start,
    with_state,
)
from tests.support.cells import CAPACITY, CELLS, DROPLESS, FROZEN, HALF, LEARNS, LEARNS_DDP, PLAIN
from tests.support.distillation import record
from tests.support.ranks import LOGGED, SAMPLES, Cell, Outcome, alone, assert_close, make_trainer, on_ranks, train
from tests.support.spawn import spawn
from tests.support.synthetic import SyntheticData
from tests.support.trainers import SaveAt

ONE_STEP: dict[str, Any] = {"moe": DROPLESS | {"mlp_type": "residual"}, "steps": 1, "accumulate": 2}
TYPED = [
    Cell("types, offloaded", 2, 2, precision="bf16-mixed", options={"offload_optimizer": True}, **ONE_STEP),
    Cell("types, fp16, ZeRO 1", 2, 1, precision="16-mixed", **ONE_STEP),
]
OVERFLOW = Cell("overflow", 2, 1, precision="16-mixed", moe=DROPLESS, steps=4, options={"hysteresis": 1})
SKIPS: dict[str, Any] = {"moe": DROPLESS, "non_finite": NonFinite("skip")}
SPOILT = [
    Cell("skip, ZeRO 1, accumulation", 2, 1, accumulate=2, **SKIPS),
    Cell("skip, ddp", strategy="ddp", **SKIPS),
]
INTERRUPTED = [(LEARNS, 3), (LEARNS_DDP, 3), (FROZEN[0], 3)]
UNEVEN = CELLS[3][0]  # 20 windows over 3 ranks, in batches of 3
SPECIALISED = Cell("specialised", 2, moe=DROPLESS, steps=2, padded=True)
UNEQUAL = Cell("unequal", 2, 1, moe=DROPLESS, steps=20)
GROWING = Cell("growing", 2, moe=DROPLESS, steps=9)
TRAFFIC = [
    Cell("traffic, bf16, recomputed", 2, 2, moe=DROPLESS, steps=2, precision="bf16-mixed", checkpointing=True),
    Cell("traffic, capacity, recomputed", 2, 1, moe=CAPACITY, steps=2, checkpointing=True),
]
# On 3 ranks the last layer's experts are spread, on 4 those of each layer, at degrees of their own.
RESIDUAL_PYRAMID = {"experts": [2, 4, 6], "layers": 6, "moe": DROPLESS | {"mlp_type": "residual"}}
# One checkpoint, saved by one process after three steps, goes on in each of these.
TOPOLOGIES: dict[int, list[Cell]] = {
    2: [
        Cell("2 ranks, degree 1, offload", 1, 1, options={"offload_optimizer": True}, **RESIDUAL_PYRAMID),
        Cell("2 ranks, ddp", strategy="ddp", **RESIDUAL_PYRAMID),
    ],
    3: [Cell("3 ranks, degree 3, ZeRO 1", 3, 1, **RESIDUAL_PYRAMID)],
    4: [Cell("4 ranks, degree 4, ZeRO 2", 4, 2, **RESIDUAL_PYRAMID)],
}
ALONE = Cell("one process", **RESIDUAL_PYRAMID)
# The same checkpoint, there and back, where weights are bf16 and the optimizer has fp32 ones.
THROUGH_HALF = [
    Cell(f"through {precision}, ZeRO {stage}", 2, stage, precision=precision, steps=4, **RESIDUAL_PYRAMID)
    for precision, stage in (("bf16-mixed", 2), ("bf16-true", 1))
]
WARM = Cell("warm start, bf16-mixed", 2, 1, steps=1, precision="bf16-mixed", **RESIDUAL_PYRAMID)
LARGE = Cell("large", 2, 1, steps=1, hidden=128, moe=DROPLESS)
TAUGHT = Cell("taught", 2, 2, moe=DROPLESS, steps=6)  # 4 blocks; the teacher is ALONE, of 6 with 2, 4 and 6 experts
TAUGHT_DDP = replace(TAUGHT, name="taught, ddp", strategy="ddp")
Found = dict[tuple[Callable[..., Any], str], list[Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process, after three steps; beside it `step=5.ckpt`, after two more."""
    folder = tmp_path_factory.mktemp("alone")
    callbacks = [ExpertLoad(), SaveAt(3, folder / "three.ckpt")]
    trainer = make_trainer(replace(ALONE, steps=4), 1, folder, *callbacks, log_every_n_steps=LOGGED)
    trainer.fit(ALONE.module(), SyntheticData(micro_batch_size=SAMPLES))
    train(ALONE, 1, folder, SAMPLES, 1, *with_state(folder), checkpoint=folder / "three.ckpt")
    record(folder / "three.ckpt", folder / "three.logits", top_k=8, samples=6 * SAMPLES)
    return folder / "three.ckpt"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process from the first step to the last."""
    return train(ALONE, 1, tmp_path_factory.mktemp("undisturbed"), SAMPLES, 1)


@pytest.fixture(scope="module")
def taught_alone(checkpoint: Path) -> Taught:
    """One process that learns from `checkpoint`, and saves beside it before the end of that."""
    return taught(TAUGHT, 1, checkpoint.parent, checkpoint)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, taught_alone: Taught, pocket_pile: Path) -> Found:
    """What every job returned, by rank; one spawn per number of ranks."""
    jobs: dict[int, list[tuple[Callable[..., Any], Cell]]] = {
        ranks: [(on_ranks, cell) for cell in cells] + [(resume, cell) for cell in TOPOLOGIES[ranks]]
        for ranks, cells in CELLS.items()
    }
    jobs[2] += [(typed, cell) for cell in [*HALF, *TYPED]] + [(traffic, cell) for cell in TRAFFIC]
    jobs[2] += [(spoilt, cell) for cell in SPOILT] + [(interrupted, cell) for cell, _ in INTERRUPTED]
    jobs[2] += [(resume, cell) for cell in THROUGH_HALF] + [(taught, cell) for cell in (TAUGHT, TAUGHT_DDP)]
    jobs[2] += [(overflow, OVERFLOW), (uneven, UNEQUAL), (growing, GROWING), (refused, PLAIN), (engine_facts, PLAIN)]
    jobs[2] += [(specialised, SPECIALISED), (warm_start, WARM), (taught_on, TAUGHT), (taught_offline, TAUGHT)]
    jobs[2] += [(save_large, LARGE)]  # the last one: from then on allocations are traced
    jobs[3] += [(evaluate_text, UNEVEN)]
    results: Found = {}
    for ranks, here in jobs.items():
        folder = checkpoint.parent / str(ranks)
        by_rank = spawn(ranks, run_all, here, ranks, folder, checkpoint, folder=folder)
        for index, (job, cell) in enumerate(here):
            results[job, cell.name] = [returned[index] for returned in by_rank]
    return results


def cases(table: dict[int, list[Cell]]) -> Any:
    """Parameters `ranks, cell`."""
    pairs = [(ranks, cell) for ranks, cells in table.items() for cell in cells]
    return pytest.mark.parametrize(("ranks", "cell"), pairs, ids=[cell.name for _, cell in pairs])


@cases(CELLS)
def test_ranks_compute_what_one_process_computes(
    ranks: int, cell: Cell, found: Found, checkpoint: Path, tmp_path: Path
) -> None:
    expected, outcomes = alone(cell, ranks, tmp_path), found[on_ranks, cell.name]
    norms = [sum(squares.values()) ** 0.5 for squares in expected.squares]
    assert min(norms) > cell.clip
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.validation == pytest.approx(expected.validation, rel=1e-5)
        experts = [name for name in expected.metrics if name.startswith(("experts/", "train/grad_norm"))]
        assert len(experts) >= 2 * 12
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
        for files in map(optimizer_of, ends)
    )
    buffers = [
        {name: files.read(name) for name in files.shapes if ".router." in name and not name.endswith("weight")}
        for files in (TensorFiles(end, "model") for end in ends)
    ]
    has_state = isinstance(cell.moe.get("router"), HashRouterConfig | nlgmoe.SigmoidRouterConfig)
    assert buffers[0].keys() == buffers[1].keys() and bool(buffers[0]) == has_state
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    # Later steps amplify rounding where a gradient is nothing but rounding; moments as a whole stay close.
    assert_close(other, first, 1e-3)


@pytest.mark.parametrize("cell", FROZEN, ids=lambda cell: cell.name)
def test_frozen_weights_of_every_rank_stay_as_they_were(cell: Cell, found: Found, checkpoint: Path) -> None:
    assert found[on_ranks, cell.name]
    first, end = split_experts(cell.module().gpt.state_dict()), checkpoint.parent / "2" / f"{cell.name} at the end.ckpt"
    files = TensorFiles(end, "model")
    for name, value in first.items():
        assert torch.equal(files.read(name), value) == is_frozen(name, cell.frozen), name
    assert list(find_problems(end)) == []


@pytest.mark.parametrize("cell", HALF, ids=lambda cell: cell.name)
def test_half_precision_follows_single(cell: Cell, found: Found, tmp_path: Path) -> None:
    expected = alone(replace(cell, precision="32-true"), 2, tmp_path)
    for outcome, _ in found[typed, cell.name]:
        assert outcome.losses == pytest.approx(expected.losses, rel=2e-2)
        norms = [sum(squares.values()) ** 0.5 for squares in expected.squares]
        assert outcome.clip_norms == pytest.approx(norms, rel=5e-2)
        assert outcome.clip_norms[0] == pytest.approx(norms[0], rel=3e-3)  # experts are in it
        # The first steps are as close as bf16 is: no step is lost or taken twice.
        assert outcome.losses[:4] == pytest.approx(expected.losses[:4], rel=1e-3)


COLUMNS = ("weights", "products", "sums", "reduced", "stepped on", "moments")


@pytest.fixture(scope="module")
def documented() -> dict[tuple[str, str], dict[str, str]]:
    """Types by run and precision, of the table in docs/numerics.md."""
    text = (Path(__file__).parents[2] / "docs/numerics.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.count(" | ") == len(COLUMNS) + 1]
    return {
        (run, precision): dict(zip(COLUMNS, types, strict=True))
        for run, precisions, *types in rows
        for precision in precisions.replace("`", "").split(", ")
    }


@pytest.mark.parametrize("cell", [*HALF, *TYPED], ids=lambda cell: cell.name)
def test_types_on_ranks_are_the_documented_ones(
    cell: Cell, found: Found, documented: dict[tuple[str, str], dict[str, str]]
) -> None:
    runs = ["ZeRO 1, 2"] if cell.precision == "32-true" else ["ZeRO 1"] if cell.stage < 2 else ["ZeRO 2"]
    run = "offloaded" if cell.options else next(run for run in runs if (run, cell.precision) in documented)
    types: dict[str, str] = {}
    for _, of_rank in found[typed, cell.name]:
        types |= of_rank
    assert types == documented[run, cell.precision]  # type: ignore[index]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_types_on_one_process_are_the_documented_ones(
    precision: str, documented: dict[tuple[str, str], dict[str, str]], tmp_path: Path
) -> None:
    _, types = typed(Cell(precision, precision=precision, **ONE_STEP), 1, tmp_path)
    expected = documented["one process, `ddp`", precision]
    assert types | {"reduced": types["sums"]} == expected


def test_an_overflow_changes_the_scale_and_the_clock_only_until_the_scale_cannot_fall(found: Found) -> None:
    for rank in found[overflow, OVERFLOW.name]:
        assert rank.scales == [2.0**11, 2.0**11, 2.0**11, 2.0**10]
        tokens, weights = zip(*rank.clocks, strict=True)
        assert tokens == tuple(SAMPLES * 16 * step for step in range(5))
        assert [before == after for before, after in pairwise(weights)] == [False, False, True, False]
        assert rank.states[0] == rank.states[1] and rank.states[0]["last_overflow_iter"] == 2
        assert set(rank.states[0]) == set(LOSS_SCALE_KEYS)
        where = "first not finite: the gradient of blocks.1.moe.experts.project_weight on rank 1"
        assert rank.error.startswith(f"step 2: the gradient norm is inf; {where}")


@pytest.mark.parametrize("cell", SPOILT, ids=lambda cell: cell.name)
def test_a_bad_expert_of_one_rank_stops_or_skips_all_ranks(cell: Cell, found: Found, tmp_path: Path) -> None:
    alone = Spoils(2)
    expected = train(cell, 1, tmp_path, SAMPLES, cell.accumulate, alone)
    for rank in found[spoilt, cell.name]:
        assert rank.outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        norms = alone.norms[:2] + alone.norms[3:]
        assert rank.norms[:2] + rank.norms[3:] == pytest.approx(norms, rel=1e-4)
        tokens, weights = zip(*rank.clocks, strict=True)
        assert tokens == tuple(SAMPLES * 16 * cell.accumulate * step for step in range(7))
        assert [before == after for before, after in pairwise(weights)] == [step == 2 for step in range(6)]
        assert rank.skipped == alone.skipped == 1
        ranks = "rank 1" if cell.strategy == "ddp" else "all ranks"  # whose tokens the expert gets
        where = f"the loss of micro-batch 1 of {cell.accumulate} on {ranks}"
        assert rank.error.startswith(f"step 2: the loss is nan; first not finite: {where};")


def test_the_engine_neither_waits_nor_compiles_and_a_group_of_one_rank_has_no_communicator(found: Found) -> None:
    assert found[engine_facts, PLAIN.name] == [(False, {}, ["gloo", "fake"])] * 2


@pytest.mark.parametrize("cell", TRAFFIC, ids=lambda cell: cell.name)
def test_bytes_sent_are_those_of_the_cost_model_and_the_host_waits_once_for_a_step(cell: Cell, found: Found) -> None:
    topology = Topology(
        gpus=2,
        expert_parallel_size=2,
        zero_stage=cell.stage,
        micro_batch_size=SAMPLES // 2,
        global_batch_size=SAMPLES,
        activation_checkpointing=cell.checkpointing,
        precision=cell.precision,  # type: ignore[arg-type]
        deepspeed=True,
    )
    predicted = estimate(cell.module().config, topology, hardware("a100-80")).communication
    counted = found[traffic, cell.name]
    rows, assignments, elsewhere = (
        sum(rank[name] for rank in counted) for name in ("rows", "assignments", "elsewhere")
    )
    assert 0 < elsewhere < assignments
    # The model takes half of the assignments to be elsewhere; these routings are not that even.
    if not cell.rank_local:
        assert rows / elsewhere == 2 * predicted.all_to_all / (assignments / 2)
        forward_passes = 1 + cell.checkpointing
        exchanges = {"nlgmoe.layers.all_to_all": 2 * forward_passes}  # of two MoE layers
        assert [rank["waits"] for rank in counted] == [exchanges | {"nlgmoe.step": 1}] * 2
    else:  # slots are sent, whatever is in them
        assert [rank["rows"] for rank in counted] == [predicted.all_to_all] * 2
        assert [rank["waits"] for rank in counted] == [{"nlgmoe.step": 1}] * 2
    assert [rank["reduced"] for rank in counted] == [predicted.dense_gradients] * 2


@pytest.mark.parametrize(("cell", "step"), INTERRUPTED, ids=[cell.name for cell, _ in INTERRUPTED])
def test_all_ranks_end_after_the_same_step_where_one_is_told_to(cell: Cell, step: int, found: Found) -> None:
    for rank, (code, saved, resumed) in enumerate(found[interrupted, cell.name]):
        assert (code, saved) == (0, step)
        assert resumed == pytest.approx(found[on_ranks, cell.name][rank].losses[step:], rel=1e-6)


@pytest.mark.parametrize(("cell", "experts"), [(TAUGHT, [1, 2, 3]), (TAUGHT_DDP, [2, 4, 6])])
def test_a_teacher_says_on_ranks_what_its_checkpoint_says_and_teaches_what_it_teaches_one_process(
    cell: Cell, experts: list[int], found: Found, taught_alone: Taught, checkpoint: Path
) -> None:
    teacher = load_model(checkpoint)
    for rank in found[taught, cell.name]:
        assert rank.gone and rank.experts == experts and len(rank.said) == 4  # of 6 steps
        assert rank.losses == pytest.approx(taught_alone.losses, rel=1e-5)
        assert len({tokens.shape[1] for tokens, _ in rank.said}) > 1  # sequences grow
        for tokens, logits in rank.said:
            torch.testing.assert_close(logits, teacher.logits(teacher(tokens).hidden), rtol=1e-5, atol=1e-5)


def test_the_end_of_distillation_is_passed_after_a_resume_on_other_ranks(
    found: Found, taught_alone: Taught, checkpoint: Path, tmp_path: Path
) -> None:
    """Saved by one process and resumed on two, and the other way round."""
    for losses in found[taught_on, TAUGHT.name]:
        assert losses == pytest.approx(taught_alone.losses[3:], rel=1e-5)
    saved = checkpoint.parent / "2" / f"{TAUGHT.name}.ckpt"
    resumed = learn(TAUGHT, 1, tmp_path, checkpoint, resume=saved)
    assert resumed.losses == pytest.approx(taught_alone.losses[3:], rel=1e-5)
    assert len(resumed.said) == 1 and resumed.gone


def test_recorded_logits_teach_two_ranks_as_one(found: Found, checkpoint: Path, tmp_path: Path) -> None:
    expected = taught_offline(TAUGHT, 1, tmp_path, checkpoint)
    assert len(expected) == 6
    for losses in found[taught_offline, TAUGHT.name]:
        assert losses == pytest.approx(expected, rel=1e-5)


def optimizer_of(path: Path) -> TensorFiles:
    """AdamW's state in a checkpoint."""
    return TensorFiles(path, "optimizer")


@cases(TOPOLOGIES)
def test_a_checkpoint_goes_on_in_any_topology_which_saves_what_one_process_saves(
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
    for kind, moment, tolerance in (
        ("model", "", 1e-6),
        ("optimizer", "exp_avg/", 2e-6),
        ("optimizer", "exp_avg_sq/", 2e-6),
    ):
        files = [TensorFiles(path, kind) for path in (ours, theirs)]
        assert files[0].shapes == files[1].shapes
        names = [name for name in files[1].shapes if name.startswith(moment)]
        tensors = [{name: without_noise(name, file.read(name)) for name in names} for file in files]
        assert_close(*tensors, tolerance)
    (mine, losses), (other, expected) = rest_of(ours), rest_of(theirs)
    assert mine == other
    assert losses == pytest.approx(expected, rel=1e-5)


def test_evaluation_with_uneven_last_batches(found: Found, tmp_path: Path) -> None:
    expected = evaluate_text(UNEVEN, 1, tmp_path)
    by_rank = found[evaluate_text, UNEVEN.name]
    assert sorted(name for rank in by_rank for name in rank if name.startswith("window ")) == sorted(
        f"window {window}" for window in range(20)
    )
    for rank in by_rank:
        assert rank == pytest.approx({name: expected[name] for name in rank}, rel=1e-5)
        assert {name for name in expected if not name.startswith("window ")} <= rank.keys()


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


def test_what_experts_are_used_for_is_added_up_over_ranks(found: Found, tmp_path: Path) -> None:
    expected = specialised(SPECIALISED, 1, tmp_path)
    assert expected.counts.sum() > 100
    for rank in found[specialised, SPECIALISED.name]:
        assert (rank.counts == expected.counts).all()
        assert (rank.domains, rank.experts, rank.step) == (expected.domains, expected.experts, 2)


def test_what_ranks_cannot_use_is_named_by_every_rank(found: Found) -> None:
    for lacks, built in found[refused, PLAIN.name]:
        assert "broken.ckpt has no model-00001-of-00002.safetensors, with blocks." in lacks
        assert "make a new MoEGPTModule for every trainer" in built


def test_a_parameter_that_the_engine_cannot_train_is_refused_by_name() -> None:
    module = nlgmoe.MoEGPTModule(nlgmoe.GPTConfig(61, 16, 2, 16, 2))
    module.gpt.final_norm.temperature = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"cannot send model\.final_norm\.temperature .* give it the shape \[1\]"):
        nlgmoe.ExpertParallelStrategy()._setup_model_and_optimizer(module, None)
    module.gpt.final_norm.requires_grad_(False)  # as a callback may do
    (strategy := nlgmoe.ExpertParallelStrategy()).connect(module)
    with pytest.raises(ValueError, match=r"requires_grad of final_norm\.\w+ is False; train on one process or"):
        strategy.on_train_start()


@pytest.mark.parametrize("cell", THROUGH_HALF, ids=lambda cell: cell.name)
def test_fp32_weights_survive_half_precision(cell: Cell, found: Found, checkpoint: Path) -> None:
    assert found[resume, cell.name]
    assert_equal(checkpoint.parent / "2" / f"{cell.name}.ckpt", checkpoint)


def without_noise(name: str, value: torch.Tensor) -> torch.Tensor:
    """Without the keys' bias: its gradient is nothing but rounding (softmax does not see it), which Adam amplifies."""
    if name.endswith("attention.qkv.bias"):
        queries, _, values = value.chunk(3)
        return torch.cat([queries, values])
    return value


def rest_of(path: Path) -> tuple[dict[str, Any], list[float]]:
    """A checkpoint's `checkpoint.json` without what measures time or memory, and the losses that are in it."""
    document = json.loads((path / "checkpoint.json").read_text().replace(str(path.parent), "FOLDER"))
    summary = document["callbacks"]["RunSummary"]
    seconds = document["clock"].pop("seconds")
    assert seconds["run"] > seconds["steps"] > 0 and seconds["validation"] >= 0
    document.pop("saved_at")
    assert document.pop("step_size")["samples"] == SAMPLES
    assert summary.pop("peak_memory_bytes") > 0
    document.pop("loss_scale", None)
    return document, summary.pop("losses")


def test_a_checkpoint_is_as_large_as_its_tensors(found: Found, checkpoint: Path) -> None:
    path = checkpoint.parent / "2" / f"{LARGE.name} at the end.ckpt"
    (expected,) = {expected for expected, _ in found[save_large, LARGE.name]}
    assert expected < sum(file.stat().st_size for file in path.iterdir()) < 1.02 * expected
    for kind in ("model", "optimizer"):
        shares = [file.stat().st_size for file in path.glob(f"{kind}*")]
        assert max(shares) < 1.05 * sum(shares) / 2  # what a rank holds of it at once
    for _, (whole, weights) in found[save_large, LARGE.name]:
        assert (
            whole < 1.3 * expected / 2
        )  # beside its share, the entry that is being gathered; a third of it twice would be 1.33
        assert weights < 0.6 * expected / 2  # a third, and the same; held twice it would be two thirds


def test_a_new_run_on_ranks_from_the_weights_of_one_process(found: Found, checkpoint: Path) -> None:
    new, original = (
        TensorFiles(path, "model") for path in (checkpoint.parent / "2" / f"{WARM.name} warm.ckpt", checkpoint)
    )
    assert new.shapes == original.shapes
    assert all(torch.equal(new.read(name), original.read(name)) for name in original.shapes)
    weights = checkpoint.parent / "2" / f"{WARM.name} weights.ckpt"
    assert len(list(weights.glob("model-*"))) == 2 and not list(weights.glob("optimizer*"))
    trainer = make_trainer(ALONE, 1, checkpoint.parent)
    expected = trainer.validate(ALONE.module(), SyntheticData(), ckpt_path=checkpoint, verbose=False)[0]["val/loss"]
    for rank in found[warm_start, WARM.name]:
        assert rank["start"] == pytest.approx(expected, rel=1e-2)  # bf16
        assert rank["from weights"] == pytest.approx(rank["end"], rel=1e-6)
