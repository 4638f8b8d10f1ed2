"""Megatron-DeepSpeed's GPT on one process, written anew with DeepSpeed's own MoE layer, and the files that it leaves.

Modules have Megatron's names, so that their state dictionaries have its keys. The forward pass follows
`megatron/model/transformer.py`: the projections give their bias apart, which the layer adds, and which DeepSpeed's MoE drops.
"""

import enum
import random
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import numpy as np
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.parallel.engine import disable_deepspeed_extensions

HIDDEN, HEADS, LAYERS, POSITIONS, ROWS, INNER = 16, 2, 4, 12, 64, 40


def arguments(**changes: Any) -> Namespace:
    """What Megatron-DeepSpeed knows of a run, as far as a checkpoint's reader cares, and some of what it does not."""
    values = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "ffn_hidden_size": INNER,
        "kv_channels": HIDDEN // HEADS, "max_position_embeddings": POSITIONS, "seq_length": POSITIONS,
        "make_vocab_size_divisible_by": 8, "padded_vocab_size": ROWS, "layernorm_epsilon": 1e-3,
        "num_experts": [1], "expert_interval": 2, "topk": 1, "mlp_type": "standard",
        "moe_train_capacity_factor": 1.5, "moe_eval_capacity_factor": 2.0, "moe_min_capacity": 2,
        "moe_token_dropping": True, "moe_loss_coeff": 0.02, "moe_expert_parallel_size": 1,
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "init_method_std": 0.014,
        "bias_gelu_fusion": True, "openai_gelu": False, "onnx_safe": None,
        "apply_residual_connection_post_layernorm": False, "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1, "params_dtype": torch.float16, "rank": 0, "teacher_model": None,
    }  # fmt: skip
    return Namespace(**{**values, **changes})


class ParallelMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(HIDDEN, INNER)
        self.dense_4h_to_h = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = F.gelu(self.dense_h_to_4h(x), approximate="tanh")
        return inner @ self.dense_4h_to_h.weight.t(), self.dense_4h_to_h.bias


class ParallelAttention(nn.Module):
    def __init__(self, thirds: bool) -> None:
        super().__init__()
        self.thirds = thirds
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.dense = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        mixed, (batch, length, _) = self.query_key_value(x), x.shape
        if self.thirds:  # since FPDT
            parts = [part.view(batch, length, HEADS, -1) for part in mixed.split(HIDDEN, dim=-1)]
        else:
            parts = list(mixed.view(batch, length, HEADS, 3 * HIDDEN // HEADS).chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in parts)
        scores = q @ k.transpose(2, 3) / (HIDDEN // HEADS) ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        return self.dense((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    def __init__(self, args: Namespace, experts: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN, eps=args.layernorm_epsilon)
        self.self_attention = ParallelAttention(hasattr(args, "ds_sequence_parallel_fpdt"))
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN, eps=args.layernorm_epsilon)
        self.mlp: nn.Module = ParallelMLP()
        if experts > 1:
            # Evaluation has room for every token, so that nothing is dropped.
            self.mlp = MoE(
                HIDDEN, ParallelMLP(), experts, ep_size=args.moe_expert_parallel_size, k=args.topk,
                eval_capacity_factor=experts, use_residual=args.mlp_type == "residual",
                use_rts=False, top2_2nd_expert_sampling=False,
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        if isinstance(self.mlp, MoE):
            return x + self.mlp(self.post_attention_layernorm(x))[0]
        y, bias = self.mlp(self.post_attention_layernorm(x))
        return x + y + bias


class GPTModel(nn.Module):
    """Every weight and bias is random, experts differ."""

    def __init__(self, args: Namespace, rows: int = ROWS) -> None:
        super().__init__()
        counts = list(args.num_experts)
        if len(counts) == 1:
            counts *= LAYERS // args.expert_interval
        experts = [
            counts[number // args.expert_interval - 1] if number % args.expert_interval == 0 else 1
            for number in range(1, LAYERS + 1)
        ]
        model = nn.Module()
        model.embedding = nn.Module()
        model.embedding.word_embeddings = nn.Embedding(rows, HIDDEN)
        model.embedding.position_embeddings = nn.Embedding(POSITIONS, HIDDEN)
        model.encoder = nn.Module()
        model.encoder.layers = nn.ModuleList(Layer(args, count) for count in experts)
        model.encoder.final_layernorm = nn.LayerNorm(HIDDEN, eps=args.layernorm_epsilon)
        self.language_model = model
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        self.eval()

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        embedding, encoder = self.language_model.embedding, self.language_model.encoder
        x = embedding.word_embeddings(tokens) + embedding.position_embeddings(torch.arange(tokens.shape[1]))
        for layer in encoder.layers:
            x = layer(x)
        return encoder.final_layernorm(x) @ embedding.word_embeddings.weight.t()

    def state_dict_for_save_checkpoint(self) -> dict[str, Any]:
        """Megatron's nested form; experts stand outside, under names that run together."""
        embedding, encoder = self.language_model.embedding, self.language_model.encoder.state_dict()
        outside = {f"encoder{name}": encoder.pop(name) for name in list(encoder) if "expert" in name}
        parts = {name: module.state_dict() for name, module in embedding.named_children()}
        return {**outside, "language_model": {"embedding": parts, "encoder": encoder}}


def random_states() -> dict[str, Any]:
    return {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state()}  # fmt: skip


def write(
    folder: Path, args: Namespace, version: float = 3.0, dtype: torch.dtype = torch.float32, rows: int = ROWS
) -> GPTModel:
    """Write `folder/latest` and `folder/global_step7`; return the model with the numbers that are in the files."""
    model = GPTModel(args, rows).to(dtype)
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    state = {
        "module": model.state_dict_for_save_checkpoint(), "args": args, "iteration": 7, "tokens": 336,
        "ds_version": "0.19.8", "ds_config": {"train_batch_size": 4}, "param_shapes": [{"a": torch.Size([3])}],
        "rng_state": [random_states()], "checkpoint_version": version,
    }  # fmt: skip
    with model_type() as member:
        args.model_type = member
        torch.save(state, step / "mp_rank_00_model_states.pt")
        del args.model_type
    moes = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    for number, (name, module) in enumerate(moes):
        for expert in range(module.num_experts):
            prefix = f"{name}.deepspeed_moe.experts.deepspeed_experts.{expert}."
            values = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(prefix)}
            torch.save(values, step / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt")
    return model.float()


@contextmanager
def model_type() -> Iterator[enum.Enum]:
    """A member of an enumeration that only Megatron has; gone afterwards."""
    kinds = enum.Enum("ModelType", ["encoder_or_decoder", "retro"], module="megatron.core.enums")
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.enums")}
    modules["megatron.core.enums"].ModelType = kinds
    with patch.dict(sys.modules, modules):
        yield kinds.encoder_or_decoder


def write_from_engine(folder: Path, changes: dict[str, Any]) -> None:
    """On a rank: have DeepSpeed's own engine save `GPTModel(arguments(**changes))`, its experts spread over all, under ZeRO 1."""
    disable_deepspeed_extensions()
    deepspeed.init_distributed("gloo", verbose=False)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = GPTModel(arguments(**changes)).state_dict()
    args = arguments(**changes, moe_expert_parallel_size=ranks)
    model = GPTModel(args)
    own = model.state_dict()
    for name, value in own.items():
        before, _, after = name.partition("deepspeed_experts.")
        if after:
            local, _, part = after.partition(".")
            here = sum(
                key.startswith(before) and key.endswith(f".{part}") and "deepspeed_experts" in key for key in own
            )
            name = f"{before}deepspeed_experts.{rank * here + int(local)}.{part}"
        value.copy_(whole[name])
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=settings)
    # What `megatron/checkpointing.py` does in save_checkpoint.
    engine.module.state_dict = lambda *_, **__: model.state_dict_for_save_checkpoint()
    with model_type() as member:
        args.model_type = member
        state = {"args": args, "checkpoint_version": 3.0, "iteration": 9, "tokens": 100, "rng_state": [random_states()]}
        engine.save_checkpoint(str(folder), client_state=state)
