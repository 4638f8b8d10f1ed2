"""What other programs do with an exported model that this package cannot change: refuse it, or compute another one.

docs/hugging_face.md has the versions that were tried.
"""

from __future__ import annotations

from collections.abc import Iterator

from nlgmoe.config import GPTConfig
from nlgmoe.pyramid import experts_per_layer

_OLMOE_EPS = 1e-5  # which llama.cpp's converter writes, whatever config.json says


def client_limits(config: GPTConfig, family: str | None, own_tokenizer: bool) -> Iterator[str]:
    """Yield a line for each program and limit that concerns the exported model.

    Args:
        config: configuration of the model.
        family: whose format the folder has; None: our code.
        own_tokenizer: its tokenizer is no published model's.
    """
    moe = config.moe
    if family is None:
        yield "llama.cpp, vLLM and mlx-lm refuse the folder: they take no model with code of its own"
        return
    if moe is not None and (family, moe.normalizes) in (("olmoe", True), ("qwen3_moe", False)):
        value = str(moe.normalizes).lower()
        yield f"llama.cpp computes another model: for {family} it ignores norm_topk_prob={value}"
    if family == "olmoe" and config.layer_norm_eps != _OLMOE_EPS:
        yield f"llama.cpp computes another model: for olmoe it ignores rms_norm_eps={config.layer_norm_eps}"
    if family == "olmoe" and config.kv_heads != config.num_heads:
        yield f"llama.cpp refuses the model: for olmoe it takes no grouped queries (num_kv_heads={config.kv_heads})"
    if family == "olmoe" and config.tied_embeddings:
        yield "llama.cpp refuses the model: for olmoe it takes no tied embeddings"
    if family == "qwen3_moe" and 0 in experts_per_layer(config):
        yield "llama.cpp refuses the model: for qwen3_moe it takes no dense blocks"
    if family == "mixtral" and config.head_size * config.num_heads != config.hidden_size:
        yield f"mlx-lm refuses the model: for mixtral it takes no head_dim={config.head_size}"
    if own_tokenizer:
        yield "llama.cpp converts tokenizers of published models alone; docs/hugging_face.md has a remedy"
