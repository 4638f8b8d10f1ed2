"""UPCYCLING: initialise a mixture of experts from a trained dense model so that it computes the same (arXiv 2212.05055).

Every expert is a copy of its block's feed-forward layer f; all other weights are copied unchanged. Without dropping and noise,
the weights of a token's k experts of E have the same sum S for every token, and the experts' output projections are divided by S:

    normalised weights          S = gate_scale             any gate
    not normalised              S = gate_scale k / E       a gate so small that the softmax rounds to 1 / E

    residual, learned   y = c_1 f(x) + c_0 (as above), and the coefficients c sum to 1
    residual, sum       y = f(x) / 2 + (as above) / 2, of the shared expert and the experts: both output projections are halved
    residual, sigmoid   y = sigmoid(w x) f(x) + (as above) / 2, and the gate's weights w are 0: those of the experts are halved

This equals the dense model's output up to rounding; with powers of two the factors themselves are exact.

Gates of weights that are not normalised still distribute the tokens over the experts, by logits that differ where their softmax
does not. The first optimizer step brings such a gate to its usual size. Scaling for a softmax before the top-k: He et al., arXiv
2410.07524. Other gates are initialised as in a new model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nlgmoe.checkpoint.entries import EXPERT, Shapes
from nlgmoe.checkpoint.reading import TensorFiles
from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.parts import require_paper_parts
from nlgmoe.pyramid import experts_at
from nlgmoe.seeding import draw_normal, key_of_draws
from nlgmoe.surgery.write_weights import weight_shapes, write_weights
from nlgmoe.validation import require

TINY = 1e-12  # times a normed input of thousands of values: far below half the last bit of 1 in fp32


@dataclass(frozen=True)
class Upcycled:
    """The result of upcycling."""

    dense: Path  # checkpoint of the dense model
    dense_config: GPTConfig  # configuration of the dense model
    config: GPTConfig  # configuration of the new model


def upcycle(
    dense: str | Path,
    checkpoint: str | Path,
    moe: MoEConfig,
    noise: float = 0.0,
    seed: int = 1234,
    overwrite: bool = False,
) -> Upcycled:
    """Write the checkpoint. At most one of its files is in memory at a time.

    Args:
        dense: checkpoint of a dense model; of a run's folder, the newest valid one.
        noise: standard deviation of independent normal values added to each expert's matrices, as a multiple of the matrix's
            own. 0: experts are equal at first, and diverge as they learn from different tokens.
        seed: seed of the noise and the gates.
    """
    require(noise >= 0, f"noise={noise} must be at least 0; 0 makes exact copies")
    require(seed >= 0, f"seed={seed} must be at least 0")
    found = find_checkpoint(dense)
    path, dense_config = found.path, found.config
    require(dense_config.moe is None, f"{path} is no dense model: it has experts; use a checkpoint with moe=null")
    for name in ("expert_ffn_size", "shared_ffn_size"):
        size = getattr(moe, name)
        require(
            size in (None, dense_config.ffn_size),
            f"{name}={size} is not the width of the dense model's layers, which are copied; leave it null",
        )
    config = replace(dense_config, moe=moe)
    require_paper_parts(config, "upcycling supports", ("moe.expert", "moe.router"))
    read = _entry_reader(found.tensors("model"), config, weight_shapes(config), noise, seed)
    origin = f"{path}, by `nlgmoe upcycle`"
    write_weights(checkpoint, read, config, found.tokenizer(), overwrite=overwrite, origin=origin, source=path)
    return Upcycled(path, dense_config, config)


def expert_factor(moe: MoEConfig, num_experts: int) -> float:
    """Return the factor of the experts' output projections in a layer of so many experts, by the table above."""
    share = 0.5 if moe.mlp_type == "residual" and moe.residual_mix != "learned" else 1.0
    if not moe.normalizes:
        share *= num_experts / moe.top_k
    return share / moe.gate_scale


def _gate_std(config: GPTConfig, dtype: torch.dtype) -> float:
    """Return the standard deviation of a gate's weights, of which `dtype` must have values."""
    moe = config.moe
    assert moe is not None
    if moe.normalizes:
        return moe.gate_init_std or config.init_std
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # 6e-8 in fp16, which makes TINY zero
    return max(TINY, 16 * least)


def _entry_reader(
    files: TensorFiles, config: GPTConfig, shapes: Shapes, noise: float, seed: int
) -> Callable[[str], Tensor]:
    """Return a function that makes an entry of the new model from those of the dense one."""
    moe = config.moe
    assert moe is not None
    residual = moe.mlp_type == "residual"
    summed, gated = (residual and moe.residual_mix == mix for mix in ("sum", "sigmoid"))

    def read(name: str) -> Tensor:
        if ".moe." not in name:
            return files.read(name)
        block, _, rest = name.partition(".moe.")
        if match := EXPERT.fullmatch(name):
            return expert(name, block, match["parameter"])
        if rest.startswith("shared_expert."):
            value = files.read(f"{block}.ffn.{rest.removeprefix('shared_expert.')}")
            return value / 2 if summed and rest.startswith("shared_expert.down") else value
        dtype = files.read(f"{block}.ffn.down.weight").dtype
        if rest.endswith("bias") or (gated and rest.startswith("coefficient")):
            return torch.zeros(shapes[name], dtype=dtype)
        std = _gate_std(config, dtype) if rest.startswith("router") else config.init_std
        return (draw_normal(shapes[name], "upcycle", seed, key_of_draws(name)) * std).to(dtype)

    def expert(name: str, block: str, parameter: str) -> Tensor:
        matrix, kind = parameter.rsplit("_", 1)  # up or down, weight or bias
        value = files.read(f"{block}.ffn.{matrix}.{kind}")
        value = value.t() if kind == "weight" else value  # expert stacks are [in, out], nn.Linear's weight [out, in]
        if noise and kind == "weight":
            std = noise * value.float().std()
            value = value + (draw_normal(value.shape, "upcycle", seed, key_of_draws(name)) * std).to(value.dtype)
        if matrix == "down":
            value = value * expert_factor(moe, experts_at(config, int(block.rpartition(".")[2])))
        return value.contiguous()

    return read
