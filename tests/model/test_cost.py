"""The cost model against a real optimizer's bytes, and against a model cut up by hand."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.model.counting import count_parameters
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.muon import MuonConfig, newton_schulz, newton_schulz_flops
from nlgmoe.optim.optimizer import AdamWConfig, build_optimizer, muon_matrices
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.memory import BUCKET
from nlgmoe.tools.planner.muon import muon_step
from nlgmoe.tools.planner.topology import Topology

PYRAMID = GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig([4, 8], mlp_type="residual"))
SMALL = {"dense": GPTConfig(61, 16, 3, 16, 2), "pyramid": PYRAMID, "no biases": replace(PYRAMID, bias=False)}
SMALL |= {"top-2": replace(PYRAMID, moe=MoEConfig(3, top_k=2))}


@pytest.mark.parametrize(
    ("name", "precision", "muon"),
    [
        ("dense", "32-true", False),
        ("pyramid", "bf16-true", False),
        ("top-2", "32-true", False),
        ("no biases", "32-true", True),  # which has one moment of a matrix
    ],
)
def test_memory_of_one_process_is_predicted_to_the_byte(name: str, precision: str, muon: bool) -> None:
    model = GPT(SMALL[name]).to(torch.float32 if precision == "32-true" else torch.bfloat16)
    optimizer = build_optimizer(model, AdamWConfig(muon=MuonConfig() if muon else None))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    memory = estimate(
        SMALL[name], Topology(precision=precision, deepspeed=False, muon=MuonConfig() if muon else None)
    ).memory
    assert memory.weights == memory.gradients == sum(p.nbytes for p in model.parameters())
    moments = (value for state in optimizer.state.values() for key, value in state.items() if key != "step")
    assert memory.optimizer == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (4, 16, 16)])
def test_flops_of_newton_schulz_are_those_that_torch_counts(shape: tuple[int, ...]) -> None:
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.randn(shape), steps=3)
    assert newton_schulz_flops(torch.Size(shape), 3) == counter.get_total_flops()


@pytest.mark.parametrize(("stage", "limit"), [(0, 1), (1, 4), (2, 1)])
def test_ranks_together_orthogonalise_each_matrix_of_muon_once(stage: int, limit: int) -> None:
    """Without ZeRO each rank does all of it; a rank has 2 or 1 of 4 and 8 experts, at degrees 4 and 4, or all of them."""
    topology = Topology(8, limit, stage, 1, 8, deepspeed=stage > 0, muon=MuonConfig())
    with torch.device("meta"):
        matrices = muon_matrices(GPT(PYRAMID))
    whole = sum(newton_schulz_flops(matrix.shape, 5) for matrix in matrices.values())
    of_ranks = [muon_step(PYRAMID, topology, rank) for rank in range(8)]
    copies = 8 if not stage else 1  # experts that two groups of ranks have are divided between them
    assert sum(rank.flops for rank in of_ranks) == copies * whole
    assert any(rank.sent for rank in of_ranks) == bool(stage)
    assert muon_step(PYRAMID, topology).sent == max(rank.sent for rank in of_ranks)
    held = sum(matrix.numel() // (limit if ".experts." in name else 1) for name, matrix in matrices.items())
    assert {rank.parameters for rank in of_ranks} == {held}


def cut_up(config: GPTConfig, gpus: int, *degrees: int) -> list[tuple[int, int]]:
    """(values on a rank, ranks that have the same ones) of every parameter of the built model; degrees of blocks 1 and 3."""
    with torch.device("meta"):
        model = GPT(config)
    pieces = []
    for name, parameter in model.named_parameters():
        degree = degrees[int(name.split(".")[1]) // 2] if ".experts." in name else 1
        pieces.append((parameter.numel() // degree, gpus // degree))
    return pieces


@pytest.mark.parametrize(("zero", "limit", "degrees"), [(0, 8, (4, 8)), (1, 8, (4, 8)), (2, 2, (2, 2))])
def test_memory_and_traffic_of_ranks_are_those_of_a_cut_up_model(
    zero: int, limit: int, degrees: tuple[int, int]
) -> None:
    topology = Topology(8, limit, zero, micro_batch_size=2, global_batch_size=48)  # 3 micro-batches a step
    cost = estimate(PYRAMID, topology)
    pieces = cut_up(PYRAMID, 8, *degrees)
    held, divided = sum(size for size, _ in pieces), sum(size / copies for size, copies in pieces)
    padding = 8 * 3  # a rank's shard of each of the three groups is rounded up
    assert cost.memory.weights == 2 * held
    assert cost.memory.gradients == pytest.approx(4 * divided if zero == 2 else 2 * held, abs=4 * padding)
    assert cost.memory.optimizer == pytest.approx(12 * (divided if zero else held), abs=12 * padding)
    assert cost.memory.buckets == (2 * 2 * BUCKET if zero else 0)
    assert cost.memory.step == pytest.approx(6 * divided if zero == 1 else 0, abs=6 * padding)
    alone = estimate(PYRAMID, Topology(1, 1, zero, micro_batch_size=2, global_batch_size=6))
    assert alone.memory.buckets == (2 * BUCKET if zero else 0)

    ring = sum(size * (copies - 1) / copies for size, copies in pieces)
    reductions = 3 if zero == 2 else 1
    sent = cost.communication
    assert sent.dense_gradients + sent.expert_gradients == pytest.approx(2 * 2 * ring * reductions, abs=100)
    assert sent.gathered_weights == pytest.approx(2 * ring if zero else 0, abs=100)
    # 3 micro-batches of 2 x 16 tokens, 16 values of 2 bytes, out and back, forward and backward
    exchange = 3 * (2 * 16) * (16 * 2) * 4
    assert sent.all_to_all == sum(exchange * (degree - 1) // degree for degree in degrees)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    total = count_parameters(PYRAMID).total
    offloaded = estimate(PYRAMID, Topology(zero_stage=1, offload_optimizer=True)).memory
    assert (offloaded.optimizer, offloaded.host) == (0, 12 * total)
