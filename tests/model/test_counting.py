"""Counts of a configuration against those of a built model, formulas by hand, and torch's counter of FLOPs."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.mla import MLAConfig
from nlgmoe.model.counting import count_parameters, flops_per_token, parameters_of
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import ExpertPlacement, experts_per_layer

SMALL = [
    GPTConfig(61, 16, 4, 16, 2),
    GPTConfig(61, 16, 5, 16, 2, ffn_hidden_size=24, moe=MoEConfig([2, 5], top_k=2)),
    GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig(3, mlp_type="residual")),
    GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig(3, expert_interval=1, mlp_type="residual", residual_mix="sum")),
    GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig([4, 6], groups=[2, 1], mlp_type="residual", residual_mix="sigmoid")),
    GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig([0, 4, 0, 6], expert_interval=1, top_k=4, expert_ffn_size=24)),
    GPTConfig(
        61, 16, 4, 16, 2, ffn_network="swiglu",
        moe=MoEConfig([0, 3], mlp_type="residual", expert_ffn_size=24, shared_ffn_size=40),
    ),
    GPTConfig(61, 16, 4, 16, 2, rope_theta=1e4, attention=MLAConfig(10, 6, 4, 12), moe=MoEConfig(3)),
    GPTConfig(61, 16, 4, 16, 2, rope_theta=1e4, norm="rmsnorm", attention=MLAConfig(10, 6, 4, 8, q_lora_rank=12)),
]  # fmt: skip


@pytest.mark.parametrize("config", SMALL)
def test_counts_of_a_built_model_are_those_of_its_configuration(config: GPTConfig) -> None:
    """A rank that holds one expert of each layer counts the others too."""
    count = count_parameters(config)
    places = {layer: ExpertPlacement(1, 1) for layer, experts in enumerate(experts_per_layer(config)) if experts}
    for placements in ({}, places):
        with torch.device("meta"):
            model = GPT(config, placements=placements)
        assert parameters_of(model) == (count.total, count.active)


@pytest.mark.parametrize("config", SMALL)
def test_active_parameters_leave_out_experts_that_are_not_chosen(config: GPTConfig) -> None:
    count = count_parameters(config)
    matrices, width = 3 if config.ffn_network == "swiglu" else 2, config.expert_ffn_size
    one_expert = matrices * config.hidden_size * width + (matrices - 1) * width + config.hidden_size
    layers = sum(experts > 0 for experts in experts_per_layer(config))
    top_k = 0 if config.moe is None else config.moe.top_k
    assert count.active == count.total - count.experts + layers * top_k * one_expert


@pytest.mark.parametrize(
    ("changes", "widths"),
    [
        ({}, (16, 16, 16)),
        ({"attention": MLAConfig(10, 6, 4, 10)}, (10, 10, 10)),
        ({"attention": MLAConfig(10, 6, 4, 8, q_lora_rank=12)}, (10, 8, 10)),
        ({"attention": MLAConfig(10, 6, 4, 14)}, (10, 14, 14)),
    ],
)
def test_flops_match_torchs_own_counter_on_a_dense_model(changes: dict[str, Any], widths: tuple[int, int, int]) -> None:
    """Torch counts the masked half too, and the zeros that make keys and values equally wide; `widths`: of both, computed."""
    config = GPTConfig(128, 16, 3, 32, 2, rope_theta=1e4, **changes)
    model = GPT(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the others it cannot see on CPU
        output = model(torch.zeros(2, 16, dtype=torch.long))
        model.logits(output.hidden)
    key, value, computed = widths
    counted_by_torch_alone = config.num_layers * config.num_heads * config.seq_len * (4 * computed - key - value)
    assert counter.get_total_flops() / 32 == flops_per_token(config) / 3 + counted_by_torch_alone
