"""The roofline against hand-computed arithmetic, and its bytes against those that the model's operations read and write."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.experts import BIAS_WIDTH
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.counting import flops_per_token
from nlgmoe.model.gpt import GPT
from nlgmoe.monitoring.hardware import Hardware
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.roofline import ATTENTION, GROUPED, LOGIT_BYTES, MEMORY, PRODUCTS, block_bytes, head_bytes
from nlgmoe.tools.planner.topology import Topology

CONFIG = GPTConfig(128, 64, 4, 16, 2, moe=MoEConfig(8, top_k=2, mlp_type="residual", residual_mix="sum"))
GPU = Hardware(1e12, 1e11, 1e12, 1e10, nvlink=1e9, network=1e8)


def test_parts_by_hand() -> None:
    """4 blocks 16 wide, inner size 64; two have 8 experts, two of them a token, and a shared MLP; 2 x 64 tokens in bf16."""
    topology = Topology(micro_batch_size=2, global_batch_size=4)
    found, tokens = estimate(CONFIG, topology, GPU).roofline, 2 * 64
    network = 2 * 2 * 16 * 64  # FLOPs a token of two matrices
    assert found.dense_products == pytest.approx(3 * tokens * (4 * 2 * 4 * 16 * 16 + 4 * network) / 1e12 / PRODUCTS)
    assert found.expert_products == pytest.approx(3 * tokens * (2 * 2 * network) / 1e12 / GROUPED)
    assert found.attention == pytest.approx(3 * tokens * 4 * (2 * 2 * 16 * 64 / 2) / 1e12 / ATTENTION)
    assert found.head_products == pytest.approx(3 * tokens * 2 * 16 * 128 / 1e12 / PRODUCTS)
    gate = 3 * tokens * 2 * (2 * 16 * 8) / 1e11 / PRODUCTS
    assert found.router == pytest.approx(gate + tokens * 2 * 8 * LOGIT_BYTES / 1e10 / MEMORY)
    # A chunk of tokens: 28 bytes a logit; 10 a value of the table's gradient, and 14 once more at the end.
    assert found.head_rest == pytest.approx((tokens * 128 * 28 + 128 * 16 * (10 + 14)) / 1e10 / MEMORY)
    dense, moe = (sum(block_bytes(CONFIG, experts, topology.bytes_per)) for experts in (0, 8))
    assert found.elementwise == pytest.approx(tokens * (2 * dense + 2 * moe) / 1e10 / MEMORY)
    assert (found.recomputation, found.all_to_all) == (0, 0)
    rate = found.utilisation(CONFIG, topology, GPU) * 1e12  # FLOP/s
    assert rate * found.total == pytest.approx(tokens * flops_per_token(CONFIG))


def test_recomputation_repeats_the_blocks_forward_pass_and_ranks_exchange() -> None:
    topology = Topology(2, 2, micro_batch_size=2, global_batch_size=12)
    kept, again = (estimate(CONFIG, replace(topology, activation_checkpointing=value), GPU) for value in (False, True))
    forward = sum(block_bytes(CONFIG, experts, topology.bytes_per)[0] for experts in (0, 8, 0, 8))
    products = (kept.roofline.dense_products + kept.roofline.expert_products + kept.roofline.attention) / 3
    gate = 2 * 64 * 2 * (2 * 16 * 8) / 1e11 / PRODUCTS
    expected = products + gate + 2 * 64 * (forward + 2 * 8 * LOGIT_BYTES / 2) / 1e10 / MEMORY
    assert again.roofline.recomputation == pytest.approx(expected)
    assert again.roofline.all_to_all == pytest.approx(again.time.all_to_all / 3)  # of 3 micro-batches
    assert 0 < kept.roofline.all_to_all < again.roofline.all_to_all


def test_fp32_runs_at_its_own_peak() -> None:
    half, single = (estimate(CONFIG, Topology(precision=p), GPU).roofline for p in ("bf16-mixed", "32-true"))
    assert single.dense_products == pytest.approx(10 * half.dense_products)
    assert single.elementwise > 1.5 * half.elementwise


class Moved(TorchDispatchMode):
    """Counts the bytes that operations beside matrix products and attention read and write."""

    products = ("mm", "addmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")
    idle = ("empty_like", "new_empty", "_unsafe_view", "gather")  # the last reads few of the values

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if not (func.is_view or name.removesuffix("_backward") in self.products + self.idle):
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor))
        elif name == "_grouped_mm" and BIAS_WIDTH in args[0].shape:  # the experts' biases, as a product
            self.bytes += found.nbytes + args[1].nbytes
        return found


def moved(config: GPTConfig) -> tuple[int, int, int, int]:
    """Tokens, and bytes of the model's forward pass, of the loss, and of both backward passes."""
    model, tokens = GPT(config).bfloat16(), torch.randint(config.vocab_size, (2, config.seq_len + 1))
    targets = tokens[:, 1:].flatten()
    with Moved() as forward:
        hidden = model(tokens[:, :-1]).hidden.flatten(0, 1)
    with Moved() as loss:
        value = cross_entropy(hidden, model.unembedding, config.vocab_size, targets, None, 128)
    with Moved() as backward:
        value.backward()
    return len(targets), forward.bytes, loss.bytes, backward.bytes


VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "standard": {},
    "top-2": {"top_k": 2},
    "residual": {"mlp_type": "residual"},
    "residual, sum": {"mlp_type": "residual", "residual_mix": "sum"},
    "rotary": {"block": {"rope_theta": 1e4, "num_kv_heads": 2}},
    "no biases": {"block": {"bias": False, "head_dim": 128}},
}


@pytest.mark.usefixtures("biases_as_on_accelerators")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_of_a_block_are_those_that_its_operations_move(variant: str) -> None:
    """Of two more blocks; within a twentieth, as what depends on the number of experts alone is left out."""
    chosen = VARIANTS[variant]
    block = {} if chosen is None else chosen.get("block", {})
    moe = MoEConfig(4, expert_interval=1, token_dropping=False, **({} if block else chosen or {}))
    two, four = (GPTConfig(128, 512, layers, 256, 4, **block, moe=None if chosen is None else moe) for layers in (2, 4))
    (tokens, forward, _, backward), (_, less_forward, _, less_backward) = moved(four), moved(two)
    size = Topology(precision="bf16-true").bytes_per
    predicted = block_bytes(four, 0 if chosen is None else 4, size)
    assert predicted[0] == pytest.approx((forward - less_forward) / 2 / tokens, rel=0.05)
    assert predicted[1] == pytest.approx((backward - less_backward) / 2 / tokens, rel=0.05)


def test_bytes_of_the_head_are_those_that_the_loss_moves() -> None:
    config = GPTConfig(4096, 128, 1, 64, 2)
    tokens, _, loss, _ = moved(config)
    predicted = head_bytes(config, tokens, Topology(precision="bf16-true", loss_chunk_size=128))
    scatter = 8 * tokens * 4096  # counted, though it reads and writes a value a row
    assert predicted == pytest.approx(loss - scatter, rel=0.05)
