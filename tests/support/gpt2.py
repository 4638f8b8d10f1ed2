"""Names and layouts of Hugging Face's GPT-2 for our weights."""

from torch import Tensor

PARTS = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.project",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn.expand",
    "mlp.c_proj": "ffn.project",
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "ln_f": "final_norm",
}  # module of GPT-2 -> ours

VOCAB, SEQ_LEN, LAYERS, WIDTH, HEADS, INNER = 67, 24, 3, 32, 4, 80


def our_name(theirs: str) -> str:
    part, _, leaf = theirs.removeprefix("transformer.").rpartition(".")
    if part in PARTS:
        return f"{PARTS[part]}.{leaf}"
    _, layer, part = part.split(".", 2)
    return f"blocks.{layer}.{PARTS[part]}.{leaf}"


def as_theirs(name: str, value: Tensor) -> Tensor:
    """Cut the vocabulary's padding off; `Conv1D` stores `[in, out]`."""
    if name.endswith("wte.weight"):
        return value[:VOCAB]
    return value.t() if name.rpartition(".")[0].rpartition(".")[2] in ("c_attn", "c_proj", "c_fc") else value
