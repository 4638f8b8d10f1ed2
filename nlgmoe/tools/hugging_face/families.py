"""Models of other families in the format of `transformers`: their settings and the names of their weights.

    family      block (`configs/block/`)                         import   export
    olmoe       OLMoE: every block MoE                           yes      yes
    qwen3_moe   Qwen3-MoE: blocks may be dense                   yes      yes
    mixtral     Mixtral: every block MoE, normalised weights     yes      yes
    llama       Llama, dense                                     yes      yes
    qwen3       Qwen3, dense                                     yes      yes
    gpt2        GPT-2: the paper's block, dense                  yes      no

`NAMES` maps each entry of a checkpoint to the tensors of a family's files, and `pieces` lists them for a model, for both
directions. tests/equivalence/test_open_moes.py compares logits, gradients and generation with the classes of `transformers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.surgery.write_weights import weight_shapes
from nlgmoe.validation import RunError

TABLES = ("token_embedding.weight", "head.weight")  # their rows from `vocab_size` on are padding
_NUMBER = r"(?<=\.)\d+(?=\.)"
_LAYER = "model.layers.{}."
_BLOCK = {
    "blocks.#.attention_norm.weight": [_LAYER + "input_layernorm.weight"],
    "blocks.#.attention.qkv.weight": [_LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"],
    "blocks.#.attention.project.weight": [_LAYER + "self_attn.o_proj.weight"],
    "blocks.#.attention.query_norm.weight": [_LAYER + "self_attn.q_norm.weight"],
    "blocks.#.attention.key_norm.weight": [_LAYER + "self_attn.k_norm.weight"],
    "blocks.#.ffn_norm.weight": [_LAYER + "post_attention_layernorm.weight"],
    "blocks.#.ffn.gate.weight": [_LAYER + "mlp.gate_proj.weight"],
    "blocks.#.ffn.expand.weight": [_LAYER + "mlp.up_proj.weight"],
    "blocks.#.ffn.project.weight": [_LAYER + "mlp.down_proj.weight"],
    "blocks.#.moe.router.weight": [_LAYER + "mlp.gate.weight"],
    "blocks.#.moe.experts.#.gate_weight": [_LAYER + "mlp.experts.{}.gate_proj.weight"],
    "blocks.#.moe.experts.#.expand_weight": [_LAYER + "mlp.experts.{}.up_proj.weight"],
    "blocks.#.moe.experts.#.project_weight": [_LAYER + "mlp.experts.{}.down_proj.weight"],
    "token_embedding.weight": ["model.embed_tokens.weight"],
    "final_norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
}
_MIXTRAL = {
    "blocks.#.moe.router.weight": [_LAYER + "block_sparse_moe.gate.weight"],
    "blocks.#.moe.experts.#.gate_weight": [_LAYER + "block_sparse_moe.experts.{}.w1.weight"],
    "blocks.#.moe.experts.#.expand_weight": [_LAYER + "block_sparse_moe.experts.{}.w3.weight"],
    "blocks.#.moe.experts.#.project_weight": [_LAYER + "block_sparse_moe.experts.{}.w2.weight"],
}
_GPT2_MODULES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.project": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.expand": "mlp.c_fc",
    "ffn.project": "mlp.c_proj",
}
_GPT2 = {
    f"blocks.#.{ours}.{leaf}": [f"transformer.h.{{}}.{theirs}.{leaf}"]
    for ours, theirs in _GPT2_MODULES.items()
    for leaf in ("weight", "bias")
} | {
    "token_embedding.weight": ["transformer.wte.weight"],
    "position_embedding.weight": ["transformer.wpe.weight"],
    "final_norm.weight": ["transformer.ln_f.weight"],
    "final_norm.bias": ["transformer.ln_f.bias"],
}
NAMES: dict[str, dict[str, list[str]]] = {
    "olmoe": _BLOCK,
    "qwen3_moe": _BLOCK,
    "mixtral": _BLOCK | _MIXTRAL,
    "llama": _BLOCK,
    "qwen3": _BLOCK,
    "gpt2": _GPT2,
}  # family -> entry, `#` for a number -> tensors
CLASSES = dict(zip(NAMES, ("Olmoe", "Qwen3Moe", "Mixtral", "Llama", "Qwen3", "GPT2"), strict=True))
"""Family -> beginning of the names of its classes."""
QK_NORM = {"olmoe": "projection", "qwen3_moe": "head", "qwen3": "head"}
# Values of settings that nlgmoe computes; a family without the setting has that value.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "sliding_window": (None,),
    "router_jitter_noise": (0.0,),
    "quantization_config": (None,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class Piece:
    """A tensor of a family's files: some rows of an entry of a checkpoint.

    Attributes:
        entry: name of the entry.
        first: the entry's row with which the tensor begins.
        rows: number of rows of the entry.
        transposed: the tensor is `[out, in]` where the entry is `[in, out]`, or the reverse.
        shape: of the tensor.
    """

    entry: str
    first: int
    rows: int
    transposed: bool
    shape: torch.Size

    def of(self, entry: Tensor) -> Tensor:
        """Return the tensor, cut out of its entry."""
        value = entry[self.first : self.first + self.rows]
        return (value.t() if self.transposed else value).contiguous()


def pieces(config: GPTConfig, family: str) -> dict[str, Piece]:
    """Return every tensor of a family's files, by name; those of an entry in the order of its rows."""
    table = {}
    heads, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
    for entry, shape in weight_shapes(config).items():
        numbers = re.findall(_NUMBER, entry)
        names = [name.format(*numbers) for name in NAMES[family][re.sub(_NUMBER, "#", entry)]]
        rows = [heads, keys, keys] if len(names) == 3 else [config.vocab_size if entry in TABLES else shape[0]]
        conv1d = entry.endswith("weight") and (".attn.c_" in names[0] or ".mlp.c_" in names[0])  # GPT-2's, [in, out]
        transposed = conv1d or ".moe.experts." in entry
        first = 0
        for name, count in zip(names, rows, strict=True):
            size = (count, *shape[1:])
            table[name] = Piece(entry, first, count, transposed, torch.Size(size[::-1] if transposed else size))
            first += count
    return table


def entry_reader(config: GPTConfig, family: str, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Return a function that reads an entry of a checkpoint, from one that reads a tensor of a family's files."""
    parts: dict[str, list[tuple[str, bool]]] = {}
    for name, piece in pieces(config, family).items():
        parts.setdefault(piece.entry, []).append((name, piece.transposed))

    def read_entry(entry: str) -> Tensor:
        value = torch.cat([read(name).t() if transposed else read(name) for name, transposed in parts[entry]])
        return pad_table(entry, value, config).contiguous()

    return read_entry


def pad_table(entry: str, value: Tensor, config: GPTConfig) -> Tensor:
    """Return an entry with the padding rows of a table, which no file of Hugging Face's format has."""
    return functional.pad(value, (0, 0, 0, config.padded_vocab_size - len(value))) if entry in TABLES else value


# ---- settings


def gpt_config(values: dict[str, Any], folder: Path) -> GPTConfig:
    """Convert the contents of a family's `config.json`."""
    family = values["model_type"]
    if values.get("per_layer_config"):  # of which their classes compute the settings of all layers
        raise RunError(f"per_layer_config of {folder} cannot be imported: nlgmoe does not support it")
    try:
        theirs = getattr(transformers, f"{CLASSES[family]}Config").from_dict(values)
    except Exception as error:  # the library's exceptions have many types
        raise RunError(f"{folder}/config.json is damaged ({error}); download or save the model again") from error
    for problem in _unsupported(theirs):
        raise RunError(f"{problem} of {folder} cannot be imported: nlgmoe does not support it")
    try:
        return _config_of(theirs, family)
    except (TypeError, ValueError) as error:
        raise RunError(f"{folder}/config.json describes no model: {error}; download or save the model again") from error


def _unsupported(theirs: Any) -> Iterator[str]:
    for name, supported in _REQUIRED.items():
        if (value := getattr(theirs, name, supported[0])) not in supported:
            yield f"{name}={value}"
    rope = getattr(theirs, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        yield f"rope_type={rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={rope['partial_rotary_factor']}"
    if set(getattr(theirs, "layer_types", None) or ()) - {"full_attention"}:
        yield f"layer_types={theirs.layer_types}"
    top_k, normalises = getattr(theirs, "num_experts_per_tok", 0), getattr(theirs, "norm_topk_prob", True)
    if top_k == 1 and normalises:
        yield "num_experts_per_tok=1 with normalised weights"
    if theirs.model_type == "gpt2" and not theirs.tie_word_embeddings:
        yield "tie_word_embeddings=False"


def _config_of(theirs: Any, family: str) -> GPTConfig:
    shape: dict[str, Any] = {
        "vocab_size": theirs.vocab_size,
        "seq_len": theirs.max_position_embeddings,
        "num_layers": theirs.num_hidden_layers,
        "hidden_size": theirs.hidden_size,
        "num_heads": theirs.num_attention_heads,
        "init_std": theirs.initializer_range,
    }
    if family == "gpt2":
        return GPTConfig(
            **shape,
            ffn_hidden_size=theirs.n_inner,
            hidden_dropout=float(theirs.resid_pdrop),
            attention_dropout=float(theirs.attn_pdrop),
            layer_norm_eps=theirs.layer_norm_epsilon,
        )
    head_dim = getattr(theirs, "head_dim", None)
    return GPTConfig(
        **shape,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=None if head_dim == theirs.hidden_size / theirs.num_attention_heads else head_dim,
        ffn_hidden_size=theirs.intermediate_size,
        attention_dropout=float(theirs.attention_dropout),
        layer_norm_eps=theirs.rms_norm_eps,
        ffn_network="swiglu",
        norm="rmsnorm",
        rope_theta=float(theirs.rope_parameters["rope_theta"]),
        qk_norm=QK_NORM.get(family),  # type: ignore[arg-type]
        bias=False,
        tied_embeddings=bool(theirs.tie_word_embeddings),
        moe=_moe_config(theirs, family),
    )


def _moe_config(theirs: Any, family: str) -> MoEConfig | None:
    if family in ("llama", "qwen3"):
        return None
    experts = theirs.num_local_experts if family == "mixtral" else theirs.num_experts
    counts, expert_size = [experts] * theirs.num_hidden_layers, None
    if family == "qwen3_moe":
        expert_size = theirs.moe_intermediate_size
        for layer in range(theirs.num_hidden_layers):
            if layer in theirs.mlp_only_layers or (layer + 1) % theirs.decoder_sparse_step:
                counts[layer] = 0
    return MoEConfig(
        num_experts=experts if all(counts) else counts,
        expert_interval=1,
        top_k=theirs.num_experts_per_tok,
        expert_ffn_size=expert_size,
        token_dropping=False,
        second_expert="argmax" if theirs.num_experts_per_tok == 2 else MoEConfig.second_expert,
        normalize_weights=None if family == "mixtral" or theirs.norm_topk_prob else False,
    )


def family_of(config: GPTConfig) -> tuple[str | None, str]:
    """Return the family whose class computes the same as a model in evaluation; or None, and the reason."""
    moe, counts = config.moe, experts_per_layer(config)
    for name, needed in {"norm": "rmsnorm", "bias": False, "ffn_network": "swiglu"}.items():
        if (value := getattr(config, name)) != needed:
            return None, f"{name}={str(value).lower()}"
    if config.rope_theta is None:
        return None, "learned positions"
    if moe is None:
        family = {None: "llama", "head": "qwen3"}.get(config.qk_norm)
        return family, "" if family else f"a dense model with qk_norm={config.qk_norm}"
    if moe.mlp_type != "standard":
        return None, f"mlp_type={moe.mlp_type}"
    if moe.expert is not None or moe.router is not None:
        return None, "a router or an expert network of its own"
    if len(set(counts) - {0}) > 1:
        return None, f"unequal numbers of experts, {counts}"
    if moe.eval_token_dropping or moe.gate_scale != 1:
        return None, "eval_token_dropping" if moe.eval_token_dropping else f"gate_scale={moe.gate_scale}"
    family = {"projection": "olmoe", "head": "qwen3_moe", None: "mixtral"}[config.qk_norm]
    if family == "mixtral" and not moe.normalizes:
        return None, "weights that are not normalised, without qk_norm"
    if family != "qwen3_moe" and 0 in counts:
        return None, "dense blocks among MoE blocks without qk_norm=head"
    if family == "olmoe" and config.head_dim is not None:
        return None, f"head_dim={config.head_dim} with qk_norm=projection"
    return family, ""


def family_settings(config: GPTConfig, family: str) -> dict[str, Any]:
    """Return the contents of a family's `config.json`, without ids of tokens."""
    moe = config.moe
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size if family in ("llama", "qwen3", "qwen3_moe") else config.expert_ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.layer_norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": config.attention_dropout,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # their defaults are another model's
    }
    if family != "olmoe":
        values["head_dim"] = config.head_size
    if moe is not None:
        experts = max(experts_per_layer(config))
        values |= {"num_experts_per_tok": moe.top_k, "num_experts": experts, "num_local_experts": experts}
        values |= {} if family == "mixtral" else {"norm_topk_prob": moe.normalizes}
    if family == "qwen3_moe":
        dense = [layer for layer, count in enumerate(experts_per_layer(config)) if not count]
        values |= {"moe_intermediate_size": config.expert_ffn_size, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    made: dict[str, Any] = getattr(transformers, f"{CLASSES[family]}Config")(**values).to_dict()
    # `num_experts` and top-level `rope_theta` are for readers of version 4.
    return made | values | {"architectures": [f"{CLASSES[family]}ForCausalLM"], "rope_theta": config.rope_theta}
