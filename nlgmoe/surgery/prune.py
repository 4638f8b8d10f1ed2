"""Prune: write a checkpoint with fewer experts. A standard mixture becomes a pyramid.

Of a router's `groups`, each keeps equally many experts. The kept ones keep their order and their rows of the router's weights
and biases. A softmax over fewer experts assigns larger probabilities, so that with `top_k` 1 the weights of the outputs increase.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nlgmoe.checkpoint.entries import EXPERT
from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
from nlgmoe.config import GPTConfig
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import Router, TopKRouter
from nlgmoe.pyramid import experts_per_position, moe_blocks
from nlgmoe.surgery.write_weights import write_weights
from nlgmoe.validation import SettingError, require


def pruned_config(config: GPTConfig, num_experts: Sequence[int]) -> GPTConfig:
    """Return the configuration with other numbers of experts."""
    require(config.moe is not None, "num_experts: a dense model has no experts; prune a mixture")
    assert config.moe is not None
    before, setting = experts_per_position(config), f"num_experts={list(num_experts)}"
    require(
        len(num_experts) == len(before),
        f"{setting} has {len(num_experts)} numbers, the model has {before}; give one for each position",
    )
    for position, (old, new) in enumerate(zip(before, num_experts, strict=True)):
        require(
            0 < new <= old or new == old,
            f"{setting}: number {position + 1} must be from 1 to {old}, which that MoE layer has"
            if old
            else f"{setting}: number {position + 1} must be 0, the block there is dense",
        )
    require(list(num_experts) != before, f"{setting} equals the model's; give a smaller number")
    router = _router_of(config)
    kind, experts = type(router).__name__, router.num_experts
    require(
        isinstance(router, TopKRouter),
        f"num_experts: {kind} does not derive from TopKRouter; only such routers can be pruned",
    )
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        if name not in router.not_per_expert and tensor.shape[:1] != (experts,):
            problem = f"num_experts: {kind}.{name}, {list(tensor.shape)}, has no row for each of {experts} experts"
            raise SettingError(f"{problem}; if pruning shall keep it, add it to {kind}.not_per_expert")
    return replace(config, moe=replace(config.moe, num_experts=list(num_experts)))


def _router_of(config: GPTConfig) -> Router:
    """Return the router of the first MoE layer, without values."""
    with torch.device("meta"):
        return MoELayer(config, next(iter(moe_blocks(config)))).router


def best_ranked(scores: Sequence[Tensor], config: GPTConfig) -> list[list[int]]:
    """Return the experts to keep in each MoE layer, in order: those with the largest scores, with `groups` of each group.

    `scores` are `[E]` of each MoE layer: their use, or their saliency (`eval/importance.py`).
    """
    assert config.moe is not None
    groups, kept = config.moe.groups[0] if config.moe.groups is not None else 1, []
    for layer_scores, count in zip(scores, moe_blocks(config).values(), strict=True):
        size = len(layer_scores) // groups
        ranked = layer_scores.unflatten(0, (groups, size)).argsort(dim=1, descending=True, stable=True)  # [G, E / G]
        first = torch.arange(groups, device=ranked.device).unsqueeze(1) * size  # of each group
        kept.append(sorted((first + ranked[:, : count // groups]).flatten().tolist()))
    return kept


def prune(
    source: Path,
    checkpoint: str | Path,
    num_experts: Sequence[int],
    kept: Sequence[Sequence[int]],
    overwrite: bool = False,
) -> GPTConfig:
    """Write the checkpoint with the experts `kept` of each MoE layer, and return its model's configuration."""
    found = find_checkpoint(source)
    document, files, before = found.document, found.tensors("model"), found.config
    config = pruned_config(before, num_experts)
    blocks, whole = list(moe_blocks(before)), _router_of(before).not_per_expert
    kept_in = {f"blocks.{block}": list(experts) for block, experts in zip(blocks, kept, strict=True)}

    def read(name: str) -> Tensor:
        block = name.partition(".moe.")[0]
        if match := EXPERT.fullmatch(name):
            return files.read(f"{match['experts']}.{kept_in[block][int(match['expert'])]}.{match['parameter']}")
        value, of_router = files.read(name), name.removeprefix(f"{block}.moe.router.")
        return value if of_router in (name, *whole) else value[kept_in[block]]

    stay = ("global_step", "tokens_seen", "started_from", "family")
    entries, origin = {name: document[name] for name in stay if name in document}, f"{source}, by `nlgmoe prune`"
    write_weights(checkpoint, read, config, found.tokenizer(), overwrite, origin, source, entries)
    return config
