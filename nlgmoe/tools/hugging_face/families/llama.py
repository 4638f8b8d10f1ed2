"""Llama and Qwen3, dense; `BLOCK` has the names of tensors that most families share."""

from __future__ import annotations

from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.settings import decoder_config, decoder_settings
from nlgmoe.tools.hugging_face.families.tensors import Slot, Slots, key_rows, query_rows

LAYER = "model.layers.{}."


def qkv(leaf: str) -> list[Slot]:
    """Return the slots of `attention.qkv`; `leaf` is weight or bias."""
    rows = {"q": query_rows, "k": key_rows, "v": key_rows}
    return [Slot(f"{LAYER}self_attn.{part}_proj.{leaf}", rows=count) for part, count in rows.items()]


def shared_mlp(name: str) -> dict[str, Slots]:
    """Return the slots of a residual layer's shared MLP, which is `mlp.{name}` in the files."""
    parts = {"gate": "gate_proj", "expand": "up_proj", "project": "down_proj"}
    return {f"blocks.#.moe.mlp.{ours}.weight": f"{LAYER}mlp.{name}.{theirs}.weight" for ours, theirs in parts.items()}


BLOCK: dict[str, Slots] = {
    "blocks.#.attention_norm.weight": LAYER + "input_layernorm.weight",
    "blocks.#.attention.qkv.weight": qkv("weight"),
    "blocks.#.attention.qkv.bias": qkv("bias"),
    "blocks.#.attention.project.weight": LAYER + "self_attn.o_proj.weight",
    "blocks.#.attention.query_norm.weight": LAYER + "self_attn.q_norm.weight",
    "blocks.#.attention.key_norm.weight": LAYER + "self_attn.k_norm.weight",
    "blocks.#.ffn_norm.weight": LAYER + "post_attention_layernorm.weight",
    "blocks.#.ffn.gate.weight": LAYER + "mlp.gate_proj.weight",
    "blocks.#.ffn.expand.weight": LAYER + "mlp.up_proj.weight",
    "blocks.#.ffn.project.weight": LAYER + "mlp.down_proj.weight",
    "blocks.#.moe.router.weight": LAYER + "mlp.gate.weight",
    "blocks.#.moe.experts.#.gate_weight": LAYER + "mlp.experts.{}.gate_proj.weight",
    "blocks.#.moe.experts.#.expand_weight": LAYER + "mlp.experts.{}.up_proj.weight",
    "blocks.#.moe.experts.#.project_weight": LAYER + "mlp.experts.{}.down_proj.weight",
    "token_embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

LLAMA = Family(
    "llama",
    "Llama",
    BLOCK,
    read=decoder_config,
    write=lambda config: decoder_settings(config, head_dim=config.head_size),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3",
    BLOCK,
    read=lambda theirs: decoder_config(theirs, qk_norm="head"),
    write=lambda config: decoder_settings(config, head_dim=config.head_size),
)
