"""Make our configuration from the arguments in a checkpoint, or refuse them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.validation import RunError, SettingError

_MISSING = object()
_NOT_HERE = "nlgmoe's GPT has none of it: this checkpoint stays with Megatron-DeepSpeed"
_WHOLE = "the slices are not joined here: load the checkpoint where it was trained with size 1, and save it again"

# Argument -> test of a value that is refused, and the reason. Arguments that the run did not have are accepted.
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tensor_model_parallel_size": (lambda size: size > 1, f"is tensor parallelism; {_WHOLE}"),
    "model_parallel_size": (lambda size: size is not None and size > 1, f"is tensor parallelism; {_WHOLE}"),
    "pipeline_model_parallel_size": (lambda size: size > 1, f"is pipeline parallelism; {_WHOLE}"),
    "use_rotary_position_embeddings": (bool, f"is rotary positions; {_NOT_HERE}"),
    "add_position_embedding": (lambda added: not added, f"is a model without learned positions; {_NOT_HERE}"),
    "untie_embeddings_and_output_weights": (bool, f"is a head of its own; {_NOT_HERE}"),
    "swiglu": (bool, f"is another activation than GELU; {_NOT_HERE}"),
    "squared_relu": (bool, f"is another activation than GELU; {_NOT_HERE}"),
    "normalization": (lambda kind: kind != "layernorm", f"is another norm than LayerNorm; {_NOT_HERE}"),
    "apply_layernorm_1p": (bool, f"is another norm than LayerNorm; {_NOT_HERE}"),
    "apply_residual_connection_post_layernorm": (bool, f"is BERT's order of norms; {_NOT_HERE}"),
    "add_bias_linear": (lambda added: not added, f"is a model without biases; {_NOT_HERE}"),
    "num_experts_switch": (lambda count: count is not None, f"is Megatron-LM's own MoE; {_NOT_HERE}"),
    "retro_add_retriever": (bool, f"is a retriever; {_NOT_HERE}"),
}


def check_supported(args: Namespace, accept_tanh_gelu: bool) -> None:
    """Refuse arguments of models that nlgmoe does not have.

    Args:
        args: of the checkpoint.
        accept_tanh_gelu: accept exact GELU, which becomes the tanh form.
    """
    for name, (refused, reason) in REFUSED.items():
        value = getattr(args, name, _MISSING)
        if value is not _MISSING and refused(value):
            raise RunError(f"{name}={value} {reason}")
    heads, hidden = _required(args, "num_attention_heads"), _required(args, "hidden_size")
    groups = getattr(args, "num_key_value_heads", None)
    if groups not in (None, heads):
        raise RunError(f"num_key_value_heads={groups} is grouped attention; {_NOT_HERE}")
    channels = getattr(args, "kv_channels", None)
    if channels is not None and channels * heads != hidden:
        raise RunError(f"kv_channels={channels} is not hidden_size / num_attention_heads; {_NOT_HERE}")
    # `megatron/model/transformer.py`, ParallelMLP: the fused form and OpenAI's are tanh, F.gelu and `erf_gelu` exact.
    tanh = getattr(args, "openai_gelu", False) or (
        getattr(args, "bias_gelu_fusion", False) and not getattr(args, "onnx_safe", False)
    )
    if not tanh and not accept_tanh_gelu:
        raise RunError(
            "bias_gelu_fusion=False is GELU in its exact form, nlgmoe's is the tanh form; --accept-tanh-gelu takes the model "
            "all the same, its logits are then a little different"
        )


def experts_of(args: Namespace) -> int | list[int] | None:
    """Return experts per MoE position, as `MoEConfig.num_experts`; None for a dense model.

    Megatron builds a layer of one expert as a dense one.
    """
    given = getattr(args, "num_experts", None) or [1]
    counts: list[int] = list(given) if isinstance(given, list | tuple) else [given]
    if max(counts) <= 1:
        return None
    return [0 if count <= 1 else count for count in counts] if len(counts) > 1 else counts[0]


def model_config(args: Namespace, rows: int, positions: int, vocab_size: int | None) -> GPTConfig:
    """Make the configuration of the checkpoint's model; settings of training are those of the run.

    Args:
        args: of the checkpoint.
        rows: of the token embedding, padding included.
        positions: of the position embedding.
        vocab_size: ids to keep; None: all rows.
    """
    hidden, ffn = _required(args, "hidden_size"), getattr(args, "ffn_hidden_size", None)
    multiple = getattr(args, "make_vocab_size_divisible_by", 1)
    vocab_size = rows if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= rows:
        raise SettingError(
            f"vocab_size={vocab_size} must be between 1 and the {rows} rows of the checkpoint's embedding"
        )
    return GPTConfig(
        vocab_size=vocab_size,
        seq_len=min(positions, getattr(args, "seq_length", None) or positions),  # those past it were never trained
        num_layers=_required(args, "num_layers"),
        hidden_size=hidden,
        num_heads=_required(args, "num_attention_heads"),
        ffn_hidden_size=None if ffn == 4 * hidden else ffn,
        hidden_dropout=getattr(args, "hidden_dropout", 0.0),
        attention_dropout=getattr(args, "attention_dropout", 0.0),
        init_std=getattr(args, "init_method_std", 0.02),
        layer_norm_eps=_required(args, "layernorm_epsilon"),
        vocab_size_multiple=multiple if rows % multiple == 0 else 1,
        moe=_moe_config(args),
    )


def _moe_config(args: Namespace) -> MoEConfig | None:
    experts = experts_of(args)
    if experts is None:
        return None
    kind = getattr(args, "mlp_type", "standard")
    if kind not in ("standard", "residual"):
        raise RunError(f"mlp_type={kind} must be standard or residual; {_NOT_HERE}")
    return MoEConfig(
        num_experts=experts,
        expert_interval=getattr(args, "expert_interval", 2),
        top_k=getattr(args, "topk", 1),
        mlp_type="residual" if kind == "residual" else "standard",
        train_capacity_factor=getattr(args, "moe_train_capacity_factor", 1.0),
        eval_capacity_factor=getattr(args, "moe_eval_capacity_factor", 1.0),
        min_capacity=getattr(args, "moe_min_capacity", 4),
        token_dropping=getattr(args, "moe_token_dropping", True),
        second_expert="sample" if getattr(args, "moe_top2_2nd_expert_sampling", True) else "argmax",
        loss_coeff=getattr(args, "moe_loss_coeff", 0.1),
        aux_scope="rank",
    )


def _required(args: Namespace, name: str) -> Any:
    value = getattr(args, name, None)
    if value is None:
        raise RunError(
            f"{name} is not among the checkpoint's arguments, so its model is unknown; use another checkpoint"
        )
    return value
