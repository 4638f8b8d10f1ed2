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
from swiglu_expert import SwiGLUExpert

import nlgmoe
from benchmarks.ranks import wrong
from nlgmoe.callbacks import ExpertLoad
from nlgmoe.checkpoint.folder import TensorFiles
from nlgmoe.checkpoint.portable import load_model
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.monitoring.hardware import hardware
from nlgmoe.non_finite import NonFinite
from nlgmoe.parallel.checkpointing import LOSS_SCALE_KEYS
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.topology import Topology
from tests.checkpoint.runs import SaveAt
from tests.distill.test_offline_teacher import record
from tests.distributed.cells import (
    LOGGED,
    SAMPLES,
    Cell,
    Outcome,
    Spoils,
    Taught,
    alone,
    engine_facts,
    evaluate,
    evaluate_text,
    gpu_ranks,
    growing,
    interrupted,
    learn,
    lowest_scale,
    make_trainer,
    on_ranks,
    overflow,
    refused,
    resume,
    resume_halves,
    run_all,
    save_large,
    spawn,
    specialised,
    spoilt,
    taught,
    taught_offline,
    taught_on,
    traffic,
    train,
    typed,
    uneven,
    warm_start,
    with_state,
)
from tests.synthetic import SyntheticData

DROPLESS = {"token_dropping": False, "aux_scope": "global"}
SHAPES = {"expert_interval": 1, "mlp_type": "residual", "expert_ffn_size": 48, "shared_ffn_size": 64}
LEARNING = {
    "token_dropping": False,
    "top_k": 2,
    "router": nlgmoe.SigmoidTopK(0.01, sequence_loss_coeff=0.1),
    "expert": SwiGLUExpert(8),
}
CAPACITY = {"aux_scope": "rank", "train_capacity_factor": 1.0, "min_capacity": 1}
PYRAMID = [2, 4, 8]
ARGMAX = DROPLESS | {"top_k": 2, "second_expert": "argmax"}
MODERN = {"norm": "rmsnorm", "rope_theta": 100.0, "bias": False, "tied_embeddings": False}

REFUSED = Cell("degree 2, ZeRO 2", 2, 2, steps=20)
ACCUMULATING = Cell("accumulation, residual", 2, moe=DROPLESS | {"mlp_type": "residual"}, accumulate=2)
LEARNING_DDP = Cell("ddp, router that learns from steps", strategy="ddp", moe=LEARNING, padded=True, steps=5)
SAMPLED = CAPACITY | {"top_k": 2}
QWEN3 = MODERN | {"qk_norm": "head", "head_dim": 8, "num_kv_heads": 1}
HASH = {"router": nlgmoe.HashRouterConfig(), "mlp_type": "residual"}
CELLS: dict[int, list[Cell]] = {  # about one for each choice that ranks could get wrong
    2: [
        Cell("degree 1, ZeRO 1", 1, 1, steps=5),
        REFUSED,
        # Few steps: a sampled second expert is decided by less than rounding once in some 100,000 choices.
        Cell("capacity, sampled top-2, accumulation", 2, 0, moe=SAMPLED, accumulate=2, steps=5),
        ACCUMULATING,
        Cell("activation checkpointing, top-2", 2, 1, moe=ARGMAX, checkpointing=True, steps=5),
        Cell("uneven masks", 2, moe=DROPLESS | {"z_loss_coeff": 0.01}, padded=True, documents=True),
        Cell("offload", 2, options={"offload_optimizer": True}, steps=5),
        Cell("ddp, masks", strategy="ddp", moe=DROPLESS, accumulate=2, padded=True, documents=True, steps=5),
        Cell("auto, capacity", strategy="auto", moe=CAPACITY, checkpointing=True, steps=5),
        Cell("layer map", 2, experts=[0, 4, 2, 0], moe=DROPLESS | SHAPES, network="swiglu", steps=5),
        Cell("the block of Qwen3-MoE", 2, 2, moe=ARGMAX, block=QWEN3, network="swiglu", padded=True, documents=True, steps=5),
        Cell("router that looks up", 2, 1, moe={"router": HashRouterConfig(1), "mlp_type": "residual"}, steps=5),
        Cell("hash router", 2, 2, moe=HASH, padded=True, steps=5),
        Cell("router that learns from steps", 2, 2, moe=LEARNING, accumulate=2),
        LEARNING_DDP,
    ],
    3: [Cell("six experts", 3, experts=6)],
    4: [
        Cell("pyramid", 4, 2, experts=PYRAMID, layers=6, moe=DROPLESS | {"mlp_type": "residual"}, steps=5),
        Cell("pyramid, ZeRO 1, capacity", 4, 1, experts=PYRAMID, layers=6, moe=CAPACITY, accumulate=2),
    ],
}  # fmt: skip
HALF = [
    Cell("bf16-mixed, ZeRO 1", 2, 1, precision="bf16-mixed", moe=DROPLESS),
    Cell("bf16-mixed, ZeRO 2, accumulation", 2, 2, precision="bf16-mixed", moe=DROPLESS, accumulate=2),
    Cell("bf16-true", 2, 1, precision="bf16-true", moe=DROPLESS),
]
ONE_STEP: dict[str, Any] = {"moe": DROPLESS | {"mlp_type": "residual"}, "steps": 1, "accumulate": 2}
TYPED = [
    Cell("types, fp32", 2, 2, **ONE_STEP),
    Cell("types, bf16-true, ZeRO 2", 2, 2, precision="bf16-true", **ONE_STEP),
    Cell("types, offloaded", 2, 2, precision="bf16-mixed", options={"offload_optimizer": True}, **ONE_STEP),
    Cell("types, fp16, ZeRO 1", 2, 1, precision="16-mixed", **ONE_STEP),
    Cell("types, fp16, ZeRO 2", 2, 2, precision="16-mixed", **ONE_STEP),
]
OVERFLOW = Cell("overflow", 2, 1, precision="16-mixed", moe=DROPLESS, steps=4, options={"hysteresis": 1})
SKIPS: dict[str, Any] = {"moe": DROPLESS, "non_finite": NonFinite("skip")}
SPOILT = [
    Cell("skip, ZeRO 1, accumulation", 2, 1, accumulate=2, **SKIPS),
    Cell("skip, ddp", strategy="ddp", **SKIPS),
    Cell("skip, bf16-mixed, ZeRO 2", 2, 2, precision="bf16-mixed", **SKIPS),
]
INTERRUPTED = [(ACCUMULATING, 3), (LEARNING_DDP, 4)]  # accumulates: asked after the signal; ddp: before
UNEVEN = CELLS[3][0]  # 20 windows over 3 ranks, in batches of 3
SPECIALISED = Cell("specialised", 2, moe=DROPLESS, steps=2, padded=True)
UNEQUAL = [
    Cell("unequal, spread", 2, 1, moe=DROPLESS, steps=20),
    Cell("unequal, ddp", strategy="ddp", steps=20),
]
GROWING = Cell("growing", 2, moe=DROPLESS, steps=9)
TRAFFIC = [
    Cell("traffic, fp32", 2, 1, moe=DROPLESS, steps=2),
    Cell("traffic, bf16, recomputed", 2, 2, moe=DROPLESS, steps=2, precision="bf16-mixed", checkpointing=True),
    Cell("traffic, capacity, recomputed", 2, 1, moe=CAPACITY, steps=2, checkpointing=True),
]
# On 3 ranks the last layer's experts are spread, on 4 those of each layer, at degrees of their own.
RESIDUAL_PYRAMID = {"experts": [2, 4, 6], "layers": 6, "moe": DROPLESS | {"mlp_type": "residual"}}
# One checkpoint, saved by one process after three steps, goes on in each of these.
TOPOLOGIES: dict[int, list[Cell]] = {
    2: [
        Cell("2 ranks, degree 2, ZeRO 2", 2, 2, **RESIDUAL_PYRAMID),
        Cell("2 ranks, degree 1, offload", 1, 1, options={"offload_optimizer": True}, **RESIDUAL_PYRAMID),
        Cell("2 ranks, ddp", strategy="ddp", **RESIDUAL_PYRAMID),
    ],
    3: [Cell("3 ranks, degree 3, ZeRO 2", 3, 2, **RESIDUAL_PYRAMID)],
    4: [
        Cell("4 ranks, degree 4, ZeRO 2", 4, 2, **RESIDUAL_PYRAMID),
    ],
}
ALONE = Cell("one process", **RESIDUAL_PYRAMID)
# The same checkpoint, there and back, where weights are bf16 and the optimizer has fp32 ones.
THROUGH_HALF = [
    Cell(f"through {precision}, ZeRO {stage}", 2, stage, precision=precision, steps=4, **RESIDUAL_PYRAMID)
    for precision, stage in (("bf16-mixed", 2), ("bf16-true", 1))
]
FROM_HALF = Cell("from bf16-true on one process", 2, 1, steps=4, **RESIDUAL_PYRAMID)
WARM = [
    Cell("warm start", 2, 2, steps=1, **RESIDUAL_PYRAMID),
    Cell("warm start, bf16-mixed", 2, 1, steps=1, precision="bf16-mixed", **RESIDUAL_PYRAMID),
]
LARGE = Cell("large", 2, 1, steps=1, hidden=128, moe=DROPLESS)
TAUGHT = Cell("taught", 2, 2, moe=DROPLESS, steps=6)  # 4 blocks; the teacher is ALONE, of 6 with 2, 4 and 6 experts
TAUGHT_TOO = [
    replace(TAUGHT, name="taught, ddp", strategy="ddp"),
    replace(TAUGHT, name="taught, bf16-mixed", precision="bf16-mixed"),
]
GPU_RANKS = {ranks: Cell(f"ranks.py on {ranks}") for ranks in (2, 4)}
TAUGHT_ON_FOUR = Cell("taught on 4 ranks", 4, 1, moe=DROPLESS, steps=6)
Found = dict[tuple[Callable[..., Any], str], list[Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process, after three steps; beside it `bf16-true.ckpt`, likewise, and `step=5.ckpt`, after two more."""
    folder = tmp_path_factory.mktemp("alone")
    for name, precision in {"three": "32-true", "bf16-true": "bf16-true"}.items():
        callbacks = [ExpertLoad(), SaveAt(3, folder / f"{name}.ckpt")]
        trainer = make_trainer(
            replace(ALONE, steps=4, precision=precision), 1, folder, *callbacks, log_every_n_steps=LOGGED
        )
        trainer.fit(ALONE.module(), SyntheticData(micro_batch_size=SAMPLES))
    train(ALONE, 1, folder, SAMPLES, 1, *with_state(folder), checkpoint=folder / "three.ckpt")
    record(folder / "three.ckpt", folder / "three.logits", top_k=8, samples=6 * SAMPLES)
    return folder / "three.ckpt"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process from the first step to the last."""
    return train(ALONE, 1, tmp_path_factory.mktemp("undisturbed"), SAMPLES, 1)


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path) -> float:
    """The validation loss of `checkpoint` on one process."""
    trainer = make_trainer(ALONE, 1, checkpoint.parent)
    return trainer.validate(ALONE.module(), SyntheticData(), ckpt_path=checkpoint, verbose=False)[0]["val/loss"]


@pytest.fixture(scope="module")
def taught_alone(checkpoint: Path) -> Taught:
    """One process that learns from `checkpoint`, and saves around the end of that beside it."""
    return taught(TAUGHT, 1, checkpoint.parent, checkpoint)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, taught_alone: Taught, pocket_pile: Path) -> Found:
    """What every job returned, by rank; one spawn per number of ranks."""
    results: Found = {}
    for ranks, cells in CELLS.items():
        folder = checkpoint.parent / str(ranks)
        topologies = TOPOLOGIES.get(ranks, [])
        jobs: list[tuple[Callable[..., Any], Cell]] = [(on_ranks, cell) for cell in cells]
        if ranks == 3:
            jobs += [(evaluate_text, UNEVEN)]
        if ranks == 2:
            jobs += [*((typed, cell) for cell in [*HALF, *TYPED]), (overflow, OVERFLOW), (lowest_scale, OVERFLOW)]
            jobs += [*((traffic, cell) for cell in TRAFFIC), *((spoilt, cell) for cell in SPOILT)]
            jobs += [(uneven, cell) for cell in UNEQUAL]
            jobs += [(growing, GROWING), (refused, REFUSED), (resume_halves, FROM_HALF)]
            jobs += [(specialised, SPECIALISED), (engine_facts, REFUSED)]
            jobs += [(resume, cell) for cell in THROUGH_HALF] + [(warm_start, cell) for cell in WARM]
            jobs += [(interrupted, cell) for cell, _ in INTERRUPTED]
            jobs += [(taught, cell) for cell in (TAUGHT, *TAUGHT_TOO)] + [(taught_on, TAUGHT), (taught_offline, TAUGHT)]
            jobs += [(save_large, LARGE)]  # the last one: from then on allocations are traced
        if ranks == 4:
            jobs += [(taught, TAUGHT_ON_FOUR)]
        if ranks in GPU_RANKS:
            jobs += [(gpu_ranks, GPU_RANKS[ranks])]
        jobs += [(job, cell) for cell in topologies for job in (evaluate, resume)]
        by_rank = spawn(ranks, run_all, jobs, ranks, folder, checkpoint, folder=folder)
        for index, (job, cell) in enumerate(jobs):
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
        assert outcome.metrics["time/communication"] > 0 or ranks == 1
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
    stateful = (HashRouterConfig, nlgmoe.HashRouterConfig, nlgmoe.SigmoidTopK, nlgmoe.UniformRouterConfig)
    has_state = isinstance(cell.moe.get("router"), stateful)
    assert buffers[0].keys() == buffers[1].keys() and bool(buffers[0]) == has_state
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    # Later steps amplify rounding where a gradient is nothing but rounding; moments as a whole stay close.
    assert_close(other, first, 1e-3)


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


def test_an_overflow_changes_the_scale_and_the_clock_only(found: Found) -> None:
    for rank, (seen, skipped, states) in enumerate(found[overflow, OVERFLOW.name]):
        assert skipped == 1
        assert states[0] == states[1] and states[0]["last_overflow_iter"] == 2
        assert set(states[0]) == set(LOSS_SCALE_KEYS)
        scales, tokens, weights = zip(*seen, strict=True)
        assert scales == (2.0**11, 2.0**11, 2.0**11, 2.0**10), rank
        assert tokens == tuple(SAMPLES * 16 * step for step in range(4))
        assert weights[1] != weights[2] == weights[3]


def test_an_overflow_at_the_lowest_scale_is_an_error_of_one_line(found: Found) -> None:
    for said in found[lowest_scale, OVERFLOW.name]:
        assert said.startswith(
            "step 2: the gradient norm is inf; first not finite: the gradient of blocks.1.moe.experts.project_weight on rank 1"
        )
        assert "trainer.precision=bf16-mixed" in said


@pytest.mark.parametrize("cell", SPOILT, ids=lambda cell: cell.name)
def test_a_bad_expert_of_one_rank_stops_or_skips_all_ranks(
    cell: Cell, found: Found, checkpoint: Path, tmp_path: Path
) -> None:
    assert list(find_problems(checkpoint.parent / "2" / f"{cell.name}, first at the end.ckpt")) == []
    same = Spoils(2)
    expected = train(replace(cell, precision="32-true"), 1, tmp_path, SAMPLES, cell.accumulate, same)
    exact = cell.precision == "32-true"
    for rank in found[spoilt, cell.name]:
        assert rank.outcome.losses == pytest.approx(expected.losses, rel=1e-5 if exact else 2e-2)
        assert rank.norms[:2] + rank.norms[3:] == pytest.approx(
            same.norms[:2] + same.norms[3:], rel=1e-4 if exact else 5e-2
        )
        tokens, weights = zip(*rank.clocks, strict=True)
        assert tokens == tuple(SAMPLES * 16 * cell.accumulate * step for step in range(7))
        assert [before == after for before, after in pairwise(weights)] == [step == 2 for step in range(6)]
        assert rank.skipped == same.skipped == 1
        ranks = "rank 1" if cell.strategy == "ddp" else "all ranks"  # whose tokens the expert gets
        where = f"the loss of micro-batch 1 of {cell.accumulate} on {ranks}"
        assert rank.error.startswith(f"step 2: the loss is nan; first not finite: {where};")


def test_the_engine_neither_waits_nor_compiles_and_a_group_of_one_rank_has_no_communicator(found: Found) -> None:
    for rank, facts in enumerate(found[engine_facts, REFUSED.name]):
        assert (facts["timed"], facts["extensions"]) == (False, {})
        assert facts["backends"] == ["gloo", "fake"] and facts["members"] == [rank]
        assert len(facts["collectives"]) == 6
        assert all(result == [1.0, 2.0] for result in facts["collectives"].values()), facts["collectives"]


@pytest.mark.parametrize("cell", TRAFFIC, ids=lambda cell: cell.name)
def test_bytes_sent_are_those_of_the_cost_model(cell: Cell, found: Found) -> None:
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
        assert [rank["waits"] for rank in counted] == [2 * forward_passes] * 2  # of two MoE layers
    else:  # slots are sent, whatever is in them
        assert [rank["rows"] for rank in counted] == [predicted.all_to_all] * 2
        assert [rank["waits"] for rank in counted] == [0] * 2
    assert [rank["reduced"] for rank in counted] == [predicted.dense_gradients] * 2


@pytest.mark.parametrize("cell", GPU_RANKS.values(), ids=lambda cell: cell.name)
def test_what_users_run_on_their_gpus_first(cell: Cell, found: Found) -> None:
    for figures in found[gpu_ranks, cell.name]:
        assert len(figures) == 4 and all(value > 0 for value in figures.values())
        assert wrong(figures) == []


@pytest.mark.parametrize(("cell", "step"), INTERRUPTED, ids=[cell.name for cell, _ in INTERRUPTED])
def test_all_ranks_end_after_the_same_step_where_one_is_told_to(cell: Cell, step: int, found: Found) -> None:
    for rank, (codes, steps, resumed) in enumerate(found[interrupted, cell.name]):
        assert codes == [0, 0]
        assert steps == [2, step]
        assert resumed == pytest.approx(found[on_ranks, cell.name][rank].losses[step:], rel=1e-6)


@pytest.mark.parametrize(
    ("cell", "experts"),
    [(TAUGHT, [1, 2, 3]), (TAUGHT_ON_FOUR, [1, 1, 3]), *((cell, [1, 2, 3]) for cell in TAUGHT_TOO)],
    ids=lambda value: value.name if isinstance(value, Cell) else "",
)
def test_a_teacher_says_on_ranks_what_its_checkpoint_says(
    cell: Cell, experts: list[int], found: Found, taught_alone: Taught, checkpoint: Path
) -> None:
    """From the first step to the last the same, bit for bit; and the student learns from it what it learns on one process."""
    teacher = load_model(checkpoint)
    half = cell.teacher_precision == "bf16" or (cell.precision != "32-true" and cell.teacher_precision is None)
    near = {"rtol": 0.05, "atol": 0.05} if half else {"rtol": 1e-5, "atol": 1e-5}
    exact = not half and cell.precision == "32-true"
    for rank in found[taught, cell.name]:
        assert rank.experts == ([2, 4, 6] if cell.strategy == "ddp" else experts) and rank.freed
        assert rank.losses == pytest.approx(taught_alone.losses, rel=1e-5 if exact else 2e-2)
        assert len(rank.said) == len(rank.asked) == 4  # of 6 steps
        assert all(torch.equal(answer, rank.asked[0]) for answer in rank.asked)
        for tokens, logits in rank.said:
            assert logits.dtype == (torch.bfloat16 if half else torch.float32)
            torch.testing.assert_close(logits.float(), teacher.logits(teacher(tokens).hidden), **near)


def test_the_end_of_distillation_is_passed_on_other_ranks_too(
    found: Found, taught_alone: Taught, checkpoint: Path, tmp_path: Path
) -> None:
    """A step before, and at it; saved by one process and by two, and gone on with on either."""
    left = {"before": taught_alone.losses[3:], "at": taught_alone.losses[4:]}
    lengths = {tokens.shape[1] for tokens, _ in taught_alone.said}
    assert len(lengths) > 1  # sequences grow
    for rank in found[taught_on, TAUGHT.name]:
        assert len(rank) == 4
        for name, losses in rank.items():
            assert losses == pytest.approx(left[name.partition(",")[0]], rel=1e-5), name
    for when, expected in left.items():
        for folder in (checkpoint.parent, checkpoint.parent / "2"):
            recorder, hears, _ = learn(TAUGHT, 1, tmp_path, checkpoint, resume=folder / f"{TAUGHT.name} {when}.ckpt")
            assert recorder.losses == pytest.approx(expected, rel=1e-5)
            assert len(hears.said) == (when == "before")


def test_recorded_logits_teach_two_ranks_as_one(found: Found, checkpoint: Path, tmp_path: Path) -> None:
    expected = taught_offline(TAUGHT, 1, tmp_path, checkpoint)
    assert len(expected) == 6
    for losses in found[taught_offline, TAUGHT.name]:
        assert losses == pytest.approx(expected, rel=1e-5)


def optimizer_of(path: Path) -> TensorFiles:
    """AdamW's state in a checkpoint."""
    return TensorFiles(path, "optimizer")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor's error is at most `tolerance` of its norm, or of a thousandth of all tensors' norm."""
    assert found.keys() == expected.keys()
    total = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        error = (found[name] - value).norm()
        assert error <= tolerance * max(value.norm(), 1e-3 * total), f"{name}: {error / value.norm():.1e} of its norm"


@cases(TOPOLOGIES)
def test_a_checkpoint_goes_on_in_any_topology(ranks: int, cell: Cell, found: Found, undisturbed: Outcome) -> None:
    for outcome in found[resume, cell.name]:
        assert outcome.losses == pytest.approx(undisturbed.losses[3:], rel=1e-5)
        assert outcome.validation == pytest.approx(undisturbed.validation, rel=1e-5)
        experts = [
            name for name in undisturbed.metrics if name.startswith("experts/")
        ]  # of an interval that began before
        assert len(experts) >= 2 * 12
        for name in experts:
            assert outcome.metrics[name] == pytest.approx(undisturbed.metrics[name], rel=1e-3, abs=1e-6), name


@cases(TOPOLOGIES)
def test_one_process_goes_on_from_what_ranks_saved(
    ranks: int, cell: Cell, found: Found, checkpoint: Path, undisturbed: Outcome, tmp_path: Path
) -> None:
    assert found[resume, cell.name]
    again = checkpoint.parent / str(ranks) / f"{cell.name}.ckpt"
    outcome = train(ALONE, 1, tmp_path / "again", SAMPLES, 1, checkpoint=again)
    assert outcome.losses == pytest.approx(undisturbed.losses[3:], rel=1e-6)


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
    expected = growing(GROWING, 1, tmp_path)
    assert expected.sequences == [4, 4, 4, 4, 8, 8, 12, 12, 12]
    # Lengths 4 at clocks 0, 16, 32 and 48, 4 at 64, 4 at 96, 8 at 128, 12 at 224, 16 at 368.
    assert expected.tokens == 4 * (4 * 4) + 2 * (8 * 4) + 12 * 8 + 12 * 12 + 12 * 16
    assert expected.rate == 3e-3
    for rank in found[growing, GROWING.name]:
        assert (rank.sequences, rank.tokens, rank.rate) == (expected.sequences, expected.tokens, expected.rate)
        assert rank.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("cell", UNEQUAL, ids=lambda cell: cell.name)
def test_the_clock_counts_the_tokens_of_all_ranks(cell: Cell, found: Found) -> None:
    (steps, clock, fed, rate, flops), other = found[uneven, cell.name]
    assert (steps, clock, fed, rate, flops) == other
    assert flops == pytest.approx(1, rel=1e-12)
    assert 400 <= clock == fed and 2 < steps < cell.steps
    assert rate == pytest.approx(3e-3 * (1 + math.cos(math.pi * clock / 1000)) / 2)


def test_what_experts_are_used_for_is_added_up_over_ranks(found: Found, tmp_path: Path) -> None:
    expected = specialised(SPECIALISED, 1, tmp_path)
    assert expected.counts.sum() > 100
    for rank in found[specialised, SPECIALISED.name]:
        assert (rank.counts == expected.counts).all()
        assert (rank.domains, rank.experts, rank.step) == (expected.domains, expected.experts, 2)


def test_what_ranks_cannot_use_is_named_by_every_rank(found: Found) -> None:
    for messages in found[refused, REFUSED.name]:
        lacks, built, spread, frozen, divided, more, clip, filled, steps = messages
        assert "broken.ckpt has no model-00001-of-00002.safetensors, with blocks." in lacks
        assert "make a new MoEGPTModule for every trainer" in built
        assert "expert_parallel_size=2 cannot shard a layer of the teacher: no number" in spread
        assert "trains all parameters, and requires_grad of final_norm.weight is False; train on one process" in frozen
        assert (
            "accumulate_grad_batches=2 does not divide the epoch that has ended: 1 of its micro-batches are left"
            in divided
        )
        assert more.startswith(
            "trainer.accumulate_grad_batches=2 was set during the run, and DeepSpeed's engine keeps 1"
        )
        assert clip.startswith("trainer.gradient_clip_val=0.25 was set during the run, and DeepSpeed's engine keeps")
        assert "a callback has put weights into checkpoint['state_dict']" in filled
        assert steps == "3"


def test_frozen_parameters_are_refused_by_name() -> None:
    module = nlgmoe.MoEGPTModule(nlgmoe.GPTConfig(61, 16, 2, 16, 2))
    module.gpt.final_norm.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"requires_grad of model\.final_norm\.weight is False; train on one process or with"
    ):
        nlgmoe.ExpertParallelStrategy()._setup_model_and_optimizer(module, None)


def test_a_parameter_without_dimension_is_refused_by_name() -> None:
    module = nlgmoe.MoEGPTModule(nlgmoe.GPTConfig(61, 16, 2, 16, 2))
    module.gpt.final_norm.temperature = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=r"cannot send model\.final_norm\.temperature to other .* give it the shape \[1\]"
    ):
        nlgmoe.ExpertParallelStrategy()._setup_model_and_optimizer(module, None)


@cases(TOPOLOGIES)
def test_every_topology_saves_what_it_loaded(ranks: int, cell: Cell, found: Found, checkpoint: Path) -> None:
    assert found[resume, cell.name]
    again = checkpoint.parent / str(ranks) / f"{cell.name}.ckpt"
    assert_equal(again, checkpoint)
    for kind in ("model", "optimizer"):
        if cell.strategy == "expert_parallel":  # each rank has written a part, about as much as the others
            sizes = [file.stat().st_size for file in again.glob(f"{kind}*")]
            assert len(sizes) == ranks
            assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("cell", THROUGH_HALF, ids=lambda cell: cell.name)
def test_fp32_weights_survive_half_precision(cell: Cell, found: Found, checkpoint: Path) -> None:
    assert found[resume, cell.name]
    assert_equal(checkpoint.parent / "2" / f"{cell.name}.ckpt", checkpoint)


def test_bf16_weights_of_one_process_go_on_in_fp32(found: Found, checkpoint: Path) -> None:
    """They are bf16 themselves: no digit is lost on the way, and none comes back."""
    assert found[resume_halves, FROM_HALF.name]
    halves = checkpoint.with_name("bf16-true.ckpt")
    assert_equal(checkpoint.parent / "2" / f"{FROM_HALF.name}.ckpt", halves)
    weights = TensorFiles(halves, "model")
    assert {weights.read(name).dtype for name in weights.shapes} == {torch.bfloat16}


def assert_equal(found: Path, expected: Path) -> None:
    """Both hold the same entries, of the same values, in fp32 at least."""
    for kind in ("model", "optimizer"):
        copy, original = TensorFiles(found, kind), TensorFiles(expected, kind)
        assert copy.shapes == original.shapes
        for name in original.shapes:
            assert torch.equal(copy.read(name).float(), original.read(name).float()), name


@cases(TOPOLOGIES)
def test_every_topology_saves_the_same_after_steps_of_its_own(
    ranks: int, cell: Cell, found: Found, checkpoint: Path
) -> None:
    assert found[resume, cell.name]
    ours, theirs = checkpoint.parent / str(ranks) / cell.name / "step=5.ckpt", checkpoint.with_name("step=5.ckpt")
    for kind, moment, tolerance in (
        ("model", "", 1e-6),
        ("optimizer", "exp_avg/", 2e-6),
        ("optimizer", "exp_avg_sq/", 2e-6),
    ):
        copy, original = TensorFiles(ours, kind), TensorFiles(theirs, kind)
        assert copy.shapes == original.shapes
        names = [name for name in original.shapes if name.startswith(moment)]
        assert_close(
            *({name: without_noise(name, files.read(name)) for name in names} for files in (copy, original)), tolerance
        )
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
    """A checkpoint's `checkpoint.json` without what measures time or memory, and the losses that are in it."""
    document = json.loads((path / "checkpoint.json").read_text().replace(str(path.parent), "FOLDER"))
    summary = document["callbacks"]["RunSummary"]
    assert document["callbacks"]["Throughput"].pop("elapsed") > 0
    document.pop("saved_at")
    assert document.pop("step_size")["samples"] == SAMPLES
    for name in ("wall_seconds", "step_seconds", "peak_memory_bytes"):
        assert summary.pop(name) > 0
    assert summary.pop("validation_seconds") >= 0
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


@pytest.mark.parametrize("cell", WARM, ids=lambda cell: cell.name)
def test_a_new_run_on_ranks_from_the_weights_of_one_process(
    cell: Cell, found: Found, checkpoint: Path, evaluated: float
) -> None:
    half = cell.precision != "32-true"
    new, original = (
        TensorFiles(path, "model") for path in (checkpoint.parent / "2" / f"{cell.name} warm.ckpt", checkpoint)
    )
    assert new.shapes == original.shapes
    assert all(torch.equal(new.read(name), original.read(name)) for name in original.shapes)
    weights = checkpoint.parent / "2" / f"{cell.name} weights.ckpt"
    assert len(list(weights.glob("model-*"))) == 2 and not list(weights.glob("optimizer*"))
    for rank in found[warm_start, cell.name]:
        assert rank["loss"] == pytest.approx(evaluated, rel=1e-2 if half else 1e-5)
        assert rank["from weights"] == pytest.approx(rank["trained"], rel=1e-6)
        assert "holds weights only: start a new run from it with model.warm_start.checkpoint=" in rank["resumed"]
        assert "blocks.1.moe.router.weight ([2, 32] in the checkpoint, [8, 32] in the model)" in rank["larger"]


@cases(TOPOLOGIES)
def test_evaluation_of_a_checkpoint(ranks: int, cell: Cell, found: Found, evaluated: float) -> None:
    assert found[evaluate, cell.name] == pytest.approx([evaluated] * ranks, rel=1e-5)
