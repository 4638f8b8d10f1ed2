"""UPCYCLING: a mixture of experts from a trained dense model, which computes what that did (arXiv 2212.05055).

Every expert is a copy of its block's feed-forward layer f, the rest of the model is taken over. Then, dropless and without noise,

    standard, k > 1     y = sum_i w_i f(x), and the renormalised weights w sum to 1            nothing is scaled
    standard, k = 1     y = p E f(x), and the gate's probability p is 1 / E                    output projections times E
    residual, learned   y = c_1 f(x) + c_0 (as above), and the coefficients c sum to 1         as above
    residual, sum       y = f(x) / 2 + (as above) / 2, of the shared MLP and the experts       as above, and both halved

In floating point that is the dense model's output up to rounding; with top-1 and 2^n experts the factors themselves are exact.

Top-1 weights are not renormalised, so p has to be the same for every token: the gate's weights are so small (`TINY`) that the
softmax rounds to 1 / E, while their signs still spread the tokens over the experts; the first optimizer step gives them their
size. Scaling for a softmax before the top-k: He et al., arXiv 2410.07524. With k > 1 gates begin as in a new
model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nlgmoe.checkpoint.entries import EXPERT
from nlgmoe.checkpoint.folder import TensorFiles, read_document, read_tokenizer
from nlgmoe.checkpoint.layout import Shapes
from nlgmoe.checkpoint.newest import find
from nlgmoe.checkpoint.weights_only import weight_shapes, write_weights
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.seeding import derive_seed

TINY = 1e-12  # times a normed input of thousands of values, far below half the last bit of 1 in fp32


@dataclass(frozen=True)
class Upcycled:
    """What upcycling made.

    Attributes:
        dense: the checkpoint that it began with.
        dense_config: of its model.
        config: of the new model.
    """

    dense: Path
    dense_config: GPTConfig
    config: GPTConfig


def upcycle(
    dense: str | Path, checkpoint: str | Path, moe: MoEConfig, noise: float = 0.0, seed: int = 1234
) -> Upcycled:
    """Write the checkpoint, whole or not at all; what is there is replaced. No more than one file of it is in memory.

    Args:
        dense: checkpoint of a dense model; of a run's folder, the newest valid one.
        checkpoint: `NAME.ckpt`.
        moe: the experts.
        noise: added to each expert's matrices: independent normal values whose standard deviation is this multiple of the
            matrix's own. 0: experts are equal, and differ as soon as they have learned from different tokens.
        seed: of the noise and the gates.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, its model is not dense, or the experts do not fit it.
    """
    if noise < 0:
        raise ValueError(f"noise={noise} must be at least 0; 0 makes exact copies")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    path = find(dense)
    old = GPTConfig.from_dict(read_document(path)["model_config"])
    if old.moe is not None:
        raise ValueError(f"{path} is no dense model: it has experts already; use the checkpoint of one with moe=null")
    config = replace(old, moe=moe)
    read = _entries(TensorFiles(path, "model"), config, weight_shapes(config), noise, seed)
    write_weights(checkpoint, read, config, read_tokenizer(path))
    return Upcycled(path, old, config)


def expert_scale(moe: MoEConfig, num_experts: int) -> float:
    """What an expert's output projection is multiplied by."""
    shared = 0.5 if moe.mlp_type == "residual" and moe.residual_mix == "sum" else 1.0
    return shared * (num_experts if moe.top_k == 1 else 1)


def _entries(files: TensorFiles, config: GPTConfig, shapes: Shapes, noise: float, seed: int) -> Callable[[str], Tensor]:
    """Reads an entry of the new model."""
    moe = config.moe
    assert moe is not None

    def read(name: str) -> Tensor:
        if ".moe." not in name:
            return files.read(name)
        block, _, part = name.partition(".moe.")
        like = files.read(f"{block}.ffn.project.bias")  # for its type
        if match := EXPERT.fullmatch(name):
            return expert(name, block, match["part"])
        if part.startswith("mlp."):
            value = files.read(f"{block}.ffn.{part.removeprefix('mlp.')}")
            halved = moe.residual_mix == "sum" and part.startswith("mlp.project")
            return value / 2 if halved else value
        std = TINY if moe.top_k == 1 and part.startswith("router") else config.init_std
        value = torch.zeros(shapes[name]) if part.endswith("bias") else _normal(shapes[name], seed, name) * std
        return value.to(like.dtype)

    def expert(name: str, block: str, part: str) -> Tensor:
        layer, leaf = part.rsplit("_", 1)  # expand or project, weight or bias
        value = files.read(f"{block}.ffn.{layer}.{leaf}")
        value = value.t() if leaf == "weight" else value  # ours is [in, out], a linear layer's [out, in]
        if noise and leaf == "weight":
            value = value + (_normal(value.shape, seed, name) * (noise * value.float().std())).to(value.dtype)
        if layer == "project":
            value = value * expert_scale(moe, experts_at(config, int(block.rpartition(".")[2])))
        return value.contiguous()

    return read


def _normal(shape: torch.Size, seed: int, name: str) -> Tensor:
    """N(0, 1), the same wherever it is drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed("upcycle", seed, name)))
