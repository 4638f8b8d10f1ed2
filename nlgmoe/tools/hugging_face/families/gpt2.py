"""GPT-2: the paper's block, dense. It is imported only."""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.settings import UnsupportedError, shape_fields
from nlgmoe.tools.hugging_face.families.tensors import Slot

_NORMS = {"attention_norm": "ln_1", "ffn_norm": "ln_2"}
_CONV1D = {
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}  # modules whose matrices are `[in, out]`
_TABLE = {
    f"blocks.#.{ours}.{leaf}": Slot(f"transformer.h.{{}}.{theirs}.{leaf}", in_out=ours in _CONV1D)
    for ours, theirs in (_NORMS | _CONV1D).items()
    for leaf in ("weight", "bias")
} | {
    "token_embedding.weight": Slot("transformer.wte.weight"),
    "position_embedding.weight": Slot("transformer.wpe.weight"),
    "final_norm.weight": Slot("transformer.ln_f.weight"),
    "final_norm.bias": Slot("transformer.ln_f.bias"),
}
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def _read(theirs: Any) -> GPTConfig:
    if not theirs.tie_word_embeddings:
        raise UnsupportedError("tie_word_embeddings=False")
    return GPTConfig(
        **shape_fields(theirs),
        ffn_hidden_size=theirs.n_inner,
        hidden_dropout=float(theirs.resid_pdrop),
        attention_dropout=float(theirs.attn_pdrop),
        layer_norm_eps=theirs.layer_norm_epsilon,
    )


def _named(name: str) -> str | None:
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None  # buffers in old files
    headless = name.startswith(("wte.", "wpe.", "h.", "ln_f."))  # saved without its head
    return f"transformer.{name}" if headless else name


GPT2 = Family("gpt2", "GPT2", _TABLE, _read, None, _REQUIRED, _named)
