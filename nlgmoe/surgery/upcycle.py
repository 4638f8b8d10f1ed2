"""UPCYCLING: initialise a mixture of experts from trained dense models, so that it computes the same as one of them at first.

Every expert is a copy of its block's feed-forward layer f; all other weights are copied unchanged (arXiv 2212.05055). Without
dropping and noise, the weights of a token's k experts of E have the same sum S for every token, and the experts' output
projections are divided by S:

    normalised weights          S = gate_scale             any gate
    not normalised              S = gate_scale k / E       a gate so small that the softmax rounds to 1 / E

    residual, learned   y = c_1 f(x) + c_0 (as above), and the coefficients c sum to 1
    residual, sum       y = f(x) / 2 + (as above) / 2, of the shared expert and the experts: both output projections are halved
    residual, sigmoid   y = sigmoid(w x) f(x) + (as above) / 2, and the gate's weights w are 0: those of the experts are halved

This equals the dense model's output up to rounding; with powers of two the factors themselves are exact. Three ways change it:

    granularity G   expert m G + g is shard g of copy m, F / G wide; the G shards of a copy have the same row of the gate, so that
                    a token that chooses one chooses all, with k a multiple of G. The output projections, not their biases, are
                    also multiplied by G: a shard has the G-th part of the copy's weight. Exact. (Megatron-Core multiplies each
                    of an expert's matrices by the cube root, which the activation turns into another function, off by a third.)
    redraw r        of each expert a share r of the inner units, the same of all its matrices, is drawn anew: normal, with mean
                    and deviation of the values that they replace, matrix by matrix (Drop-Upcycling, arXiv 2502.19261). Not exact;
                    experts part at once.
    parents         copies of several dense models, m P // (E / G) of the m-th; other weights are their mean, or the first's
                    (Branch-Train-MiX, arXiv 2403.07816). Exact if the parents are equal.

Gates of weights that are not normalised still distribute the tokens over the experts, by logits that differ where their softmax
does not. The first optimizer step brings such a gate to its usual size. Scaling for a softmax before the top-k: He et al., arXiv
2410.07524. Other gates are initialised as in a new model.

Letters: E experts, k experts per token, G shards of a copy, F inner width of the dense layer, P parents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nlgmoe.checkpoint.entries import EXPERT, Shapes
from nlgmoe.checkpoint.reading import Checkpoint, TensorFiles, tokenizer_matches
from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.parts import require_paper_parts
from nlgmoe.pyramid import experts_at
from nlgmoe.seeding import draw_normal, key_of_draws
from nlgmoe.surgery.write_weights import weight_shapes, write_weights
from nlgmoe.validation import require

TINY = 1e-12  # times a normed input of thousands of values: far below half the last bit of 1 in fp32


@dataclass(frozen=True)
class Ways:
    """How experts differ from copies; see above.

    Attributes:
        granularity: G, shards of each copy.
        redraw: share of each expert's inner units that is drawn anew, from 0 to 1.
        rest: weights outside the experts: the parents' `average`, or those of the `first`.
        noise: standard deviation of independent normal values added to each expert's matrices, as a multiple of the matrix's
            own. 0: experts are equal at first, and diverge as they learn from different tokens.
        seed: of all that is drawn, and of the gates.
    """

    granularity: int = 1
    redraw: float = 0.0
    rest: Literal["average", "first"] = "average"
    noise: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        require(self.granularity >= 1, f"granularity={self.granularity} must be at least 1; 1 makes whole copies")
        require(0 <= self.redraw <= 1, f"redraw={self.redraw} must be from 0 to 1; 0 makes exact copies")
        require(self.noise >= 0, f"noise={self.noise} must be at least 0; 0 makes exact copies")
        require(self.seed >= 0, f"seed={self.seed} must be at least 0")


def upcycle(
    dense: str | Path | Sequence[str | Path | Checkpoint],
    checkpoint: str | Path,
    moe: MoEConfig,
    ways: Ways = Ways(),
    overwrite: bool = False,
) -> GPTConfig:
    """Write the checkpoint, and return the new model's configuration. At most one of its files is in memory at a time.

    Args:
        dense: checkpoint of a dense model, or several of the same shape and tokenizer; of a run's folder, the newest valid one.
        moe: of the new model; its `num_experts` counts shards.
    """
    parents = [find_checkpoint(path) for path in ([dense] if isinstance(dense, str | Path) else dense)]
    _require_alike(parents)
    path, dense_config = parents[0].path, parents[0].config
    config = replace(dense_config, moe=_with_shards(moe, dense_config, ways.granularity))
    require_paper_parts(config, "upcycling supports", ("moe.expert", "moe.router"))
    read = _entry_reader([parent.tensors("model") for parent in parents], config, weight_shapes(config), ways)
    origin = f"{', '.join(str(parent.path) for parent in parents)}, by `nlgmoe upcycle`"
    write_weights(checkpoint, read, config, parents[0].tokenizer(), overwrite, origin, path)
    return config


def _require_alike(parents: Sequence[Checkpoint]) -> None:
    """Check that the parents are dense models of one shape and one tokenizer."""
    first = parents[0]
    for parent in parents:
        require(
            parent.config.moe is None,
            f"{parent.path} is no dense model: it has experts; use a checkpoint with moe=null",
        )
        pairs = zip(parent.config.to_dict().items(), first.config.to_dict().values(), strict=True)
        differing = [f"{name}={own}, not {others}" for (name, own), others in pairs if own != others]
        require(not differing, f"{parent.path} is no model like {first.path}: {'; '.join(differing)}")
        stored = parent.tokenizer()
        require(
            stored is None or tokenizer_matches(stored, first.tokenizer()),
            f"{parent.path} has another tokenizer than {first.path}; upcycle models of one tokenizer",
        )


def _with_shards(moe: MoEConfig, dense: GPTConfig, granularity: int) -> MoEConfig:
    """Return the settings with the width of the experts."""
    width = dense.ffn_size // granularity
    for name, expected in (("expert_ffn_size", width), ("shared_ffn_size", dense.ffn_size)):
        size = getattr(moe, name)
        require(
            size in (None, expected),
            f"{name}={size} is not the width of the dense model's layers, which are copied; leave it null",
        )
    if granularity == 1:
        return moe
    problem = f"granularity={granularity}"
    counts = [count for count in (moe.num_experts if isinstance(moe.num_experts, list) else [moe.num_experts]) if count]
    require(dense.ffn_size % granularity == 0, f"{problem} does not divide the dense model's width of {dense.ffn_size}")
    require(
        all(count % granularity == 0 for count in counts),
        f"{problem} does not divide num_experts={moe.num_experts}; it counts shards",
    )
    require(
        moe.top_k % granularity == 0,
        f"{problem} does not divide top_k={moe.top_k}: a token would miss shards of a copy; set top_k={granularity}",
    )
    require(
        moe.top_k != 2 or moe.second_expert != "sample",
        f"{problem}: a sampled second expert is no shard of the first one's copy; set second_expert=argmax",
    )
    require(
        moe.groups is None or all(count // moe.groups[0] % granularity == 0 for count in counts),
        f"{problem}: a copy's shards would be in several groups; leave groups null",
    )
    return replace(moe, expert_ffn_size=width)


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
    parents: Sequence[TensorFiles], config: GPTConfig, shapes: Shapes, ways: Ways
) -> Callable[[str], Tensor]:
    """Return a function that makes an entry of the new model from those of the dense ones."""
    moe = config.moe
    assert moe is not None
    residual = moe.mlp_type == "residual"
    summed, gated = (residual and moe.residual_mix == mix for mix in ("sum", "sigmoid"))

    def rest_of(name: str) -> Tensor:
        first = parents[0].read(name)
        if len(parents) == 1 or ways.rest == "first":
            return first
        total = sum((parent.read(name).double() for parent in parents[1:]), first.double())
        return (total / len(parents)).to(first.dtype)

    def read(name: str) -> Tensor:
        if ".moe." not in name:
            return rest_of(name)
        block, _, rest = name.partition(".moe.")
        if match := EXPERT.fullmatch(name):
            return expert(name, block, int(match["expert"]), match["parameter"])
        if rest.startswith("shared_expert."):
            value = rest_of(f"{block}.ffn.{rest.removeprefix('shared_expert.')}")
            return value / 2 if summed and rest.startswith("shared_expert.down") else value
        dtype = parents[0].dtypes[f"{block}.ffn.down.weight"]
        if rest.endswith("bias") or (gated and rest.startswith("coefficient")):
            return torch.zeros(shapes[name], dtype=dtype)
        if not rest.startswith("router"):
            return (draw_normal(shapes[name], "upcycle", ways.seed, key_of_draws(name)) * config.init_std).to(dtype)
        num_experts, hidden_size = shapes[name]
        copies = torch.Size((num_experts // ways.granularity, hidden_size))
        gate = draw_normal(copies, "upcycle", ways.seed, key_of_draws(name)) * _gate_std(config, dtype)
        return gate.repeat_interleave(ways.granularity, dim=0).to(dtype)

    def expert(name: str, block: str, number: int, parameter: str) -> Tensor:
        num_experts = experts_at(config, int(block.rpartition(".")[2]))
        copy, shard = divmod(number, ways.granularity)
        parent = parents[copy * len(parents) // (num_experts // ways.granularity)]
        matrix, kind = parameter.rsplit("_", 1)  # up, gate or down; weight or bias
        value = parent.read(f"{block}.ffn.{matrix}.{kind}")
        value = value.t() if kind == "weight" else value  # expert stacks are [in, out], nn.Linear's weight [out, in]
        inner = 0 if matrix == "down" else -1  # dimension of the inner units
        if parameter != "down_bias":
            value = value.chunk(ways.granularity, dim=inner)[shard]
            value = _redrawn(value, inner, ways, name, f"{block} expert {number}")
        if ways.noise and kind == "weight":
            std = ways.noise * value.float().std()
            value = value + (draw_normal(value.shape, "upcycle", ways.seed, key_of_draws(name)) * std).to(value.dtype)
        if matrix == "down":
            value = value * expert_factor(moe, num_experts)
        if parameter == "down_weight":
            value = value * ways.granularity
        return value.contiguous()

    return read


def _redrawn(value: Tensor, inner: int, ways: Ways, name: str, units_of: str) -> Tensor:
    """Draw a share of the inner units anew; `units_of` is the key of the units, which the expert's matrices share."""
    width = value.shape[inner]
    if not (count := round(ways.redraw * width)):
        return value
    units = draw_normal(torch.Size((width,)), "redrawn units", ways.seed, units_of).argsort()[:count]
    old = value.index_select(inner, units).float()
    drawn = draw_normal(old.shape, "redrawn", ways.seed, key_of_draws(name)) * old.std(correction=0) + old.mean()
    return value.index_copy(inner, units, drawn.to(value.dtype))
