"""The runs whose numbers on ranks are compared with one process's: one for each choice that ranks could get wrong.

`CELLS` and `HALF` are here, not beside their tests, since `benchmarks/parity.py` measures them too. To add a cell, add a line
to `CELLS` under its number of ranks: tests/distributed/ranks/test_parity.py compares it.
"""

from typing import Any

from hash_router import HashRouterConfig
from swiglu_expert import SwiGLUExpert

import nlgmoe
from nlgmoe.optim.muon import MuonConfig
from tests.support.ranks import Cell

DROPLESS = {"token_dropping": False, "aux_scope": "global"}
LEARNING = {
    "token_dropping": False,
    "top_k": 2,
    "router": nlgmoe.SigmoidRouterConfig(0.01, sequence_loss_coeff=0.1),
    "expert": SwiGLUExpert(8),
}
QUANTILE = {"token_dropping": False, "top_k": 2, "router": nlgmoe.QuantileRouterConfig()}
HASHED = {"token_dropping": False, "top_k": 2}
HASHED |= {"router": nlgmoe.HashedRouterConfig(0.01, smooth=2.0, hash_blocks=1)}
CAPACITY = {"aux_scope": "rank", "train_capacity_factor": 1.0, "min_capacity": 1}
ARGMAX = DROPLESS | {"top_k": 2, "second_expert": "argmax"}
QWEN3 = {"norm": "rmsnorm", "rope_theta": 100.0, "bias": False, "tied_embeddings": False} | {
    "qk_norm": "head", "head_dim": 8, "num_kv_heads": 1
}  # fmt: skip
# DeepSeek-V3's block: latent attention, and experts in groups.
LATENT = {"norm": "rmsnorm", "rope_theta": 100.0, "bias": False, "tied_embeddings": False} | {
    "attention": nlgmoe.MLAConfig(10, 6, 4, 8, q_lora_rank=12)
}  # fmt: skip
GROUPED: dict[str, Any] = {"token_dropping": False, "top_k": 2, "groups": [4, 2], "mlp_type": "residual"}
GROUPED |= {"residual_mix": "sum", "router": nlgmoe.SigmoidRouterConfig(0.01)}

# Newton-Schulz in fp32: in bf16 its rounding depends on which matrices are multiplied together.
FP32 = {"muon": MuonConfig(ns_precision="fp32")}
MUON = [
    Cell("Muon, degree 2, ZeRO 2", 2, 2, optimizer=FP32 | {"lr_scale": {"experts": 0.5}}, accumulate=2),
    Cell("Muon, degree 1, ZeRO 1", 1, 1, optimizer=FP32, moe=DROPLESS | {"mlp_type": "residual"}),
]
MUON_4 = [
    Cell("Muon, degree 2, ZeRO 1", 2, 1, experts=[2, 6, 8], layers=6, moe=CAPACITY, optimizer=FP32, network="swiglu"),
    Cell("Muon, degree 1, ZeRO 2, offloaded", 1, 2, optimizer=FP32, options={"offload_optimizer": True}),
]

PLAIN = Cell("degree 2, ZeRO 2", 2, 2, steps=20)
LEARNS = Cell("router that learns from steps", 2, 2, moe=LEARNING, accumulate=2)
LEARNS_DDP = Cell(
    "ddp, router that learns from steps", strategy="ddp", moe=LEARNING, padded=True, documents=True, steps=5
)
MIXED = ARGMAX | {"mlp_type": "residual", "z_loss_coeff": 0.01}
FROZEN = [
    Cell("frozen experts, recomputed", 2, 2, frozen=("experts",), checkpointing=True, moe=DROPLESS, accumulate=2),
    Cell("frozen dense parts, ZeRO 1", 2, 1, frozen=("router", "attention", "embeddings"), moe=MIXED, clip=0.2),
    Cell("ddp, frozen experts and norms", strategy="ddp", frozen=("experts", "norms"), moe=CAPACITY, steps=5),
]
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
LAYER_MAP = {"expert_interval": 1, "mlp_type": "residual", "expert_ffn_size": 48, "shared_ffn_size": 64}
CELLS: dict[int, list[Cell]] = {  # one for each choice that ranks could get wrong
    2: [
        PLAIN,
        # Few steps: a sampled second expert is decided by less than rounding once in some 100,000 choices.
        Cell("capacity, sampled top-2, accumulation", 2, 0, moe=CAPACITY | {"top_k": 2}, accumulate=2, steps=5),
        Cell("masks, recomputed, residual", 2, 1, moe=MIXED, checkpointing=True, padded=True, documents=True, accumulate=2),
        Cell("dropout, jitter", 2, 2, moe=CAPACITY | {"noise": "jitter"}, block=DROPOUT, options={"bucket_size": 9_999}, steps=5),
        Cell("auto, capacity", strategy="auto", moe=CAPACITY, checkpointing=True, steps=5),
        Cell("layer map", 2, experts=[0, 4, 2, 0], moe=DROPLESS | LAYER_MAP, network="swiglu", steps=5),
        Cell("the block of Qwen3-MoE", 2, 2, moe=ARGMAX, block=QWEN3, network="swiglu", padded=True, documents=True, steps=5),
        Cell("the block of DeepSeek-V3", 2, 2, experts=8, moe=GROUPED, block=LATENT, network="swiglu", accumulate=2, steps=5),
        Cell("router that looks up", 2, 1, moe={"router": HashRouterConfig(1), "mlp_type": "residual"}, steps=5),
        LEARNS,
        LEARNS_DDP,
        Cell("quantiles, recomputed", 2, 2, moe=QUANTILE, checkpointing=True, padded=True, accumulate=2, steps=5),
        Cell("hashed choice, then smooth rule", 2, 1, experts=[4, 4], layers=4, moe=HASHED, accumulate=2, steps=5),
        *FROZEN,
        *MUON,
    ],
    3: [Cell("six experts", 3, experts=6)],
    4: [
        Cell("pyramid, ZeRO 1, capacity", 4, 1, experts=[2, 4, 8], layers=6, moe=CAPACITY, accumulate=2),
        *MUON_4,
    ],
}  # fmt: skip
HALF = [
    Cell("bf16-mixed, ZeRO 2, accumulation", 2, 2, precision="bf16-mixed", moe=DROPLESS, accumulate=2),
    Cell("bf16-true, ZeRO 1", 2, 1, precision="bf16-true", moe=DROPLESS),
    Cell("bf16-mixed, capacity", 2, 2, precision="bf16-mixed", moe=CAPACITY | {"train_capacity_factor": 1.25}),
    Cell("Muon, bf16-mixed, ZeRO 1", 2, 1, precision="bf16-mixed", moe=DROPLESS, optimizer=FP32),
]
# On 3 ranks the last layer's experts are spread, on 4 those of each layer, at degrees of their own.
RESIDUAL_PYRAMID: dict[str, Any] = {"experts": [2, 4, 6], "layers": 6, "moe": DROPLESS | {"mlp_type": "residual"}}
ALONE = Cell("one process", **RESIDUAL_PYRAMID)  # whose checkpoint ranks resume
