"""GROW: a mixture with R times as many experts, each of which is there R times (arXiv 2604.19835).

    expert e R + c is copy c of expert e, with its row of the gate; p = softmax(logits) of the old mixture, p' of the new

    k' = R k             the R k largest are all copies of the old k:   w' = w / R each, the same output             exact
    k' = k = 1           the weight is p' = p / R: output projections times R                                        exact
    k' = k > 1           a token gets copies of its first choices: with k <= R the output is that of the first one alone

Noise on the rows of the gate, N(0, noise * deviation of the gate's weights), lets the copies of an expert get different tokens.
Without it the first copies get all tokens of the others.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from nlgmoe.checkpoint.entries import EXPERT
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
from nlgmoe.config import GPTConfig
from nlgmoe.parts import require_paper_parts
from nlgmoe.pyramid import experts_per_position
from nlgmoe.seeding import draw_normal, key_of_draws
from nlgmoe.surgery.write_weights import write_weights
from nlgmoe.validation import require


def grow(
    mixture: str | Path | Checkpoint,
    checkpoint: str | Path,
    num_experts: int | list[int],
    top_k: int | None = None,
    noise: float = 0.0,
    seed: int = 1234,
    overwrite: bool = False,
) -> GPTConfig:
    """Write the checkpoint, and return the new model's configuration.

    Args:
        mixture: checkpoint of a mixture; of a run's folder, the newest valid one.
        num_experts: of each MoE layer, a multiple of the mixture's; or one number for each MoE position.
        top_k: k'; None: that of the mixture.
        noise: of the copied rows of the gates, as a multiple of the standard deviation of the gate's weights.
        seed: seed of the noise.
    """
    found = find_checkpoint(mixture)
    before, files, path = found.config, found.tensors("model"), found.path
    require(before.moe is not None, f"{path} is a dense model; nlgmoe.surgery.upcycle makes a mixture of it")
    assert before.moe is not None
    config, factor = _grown(before, num_experts, top_k)
    require_paper_parts(before, "growing supports", ("moe.expert", "moe.router"))
    assert config.moe is not None
    scaled = config.moe.top_k == before.moe.top_k and not before.moe.normalizes

    def read(name: str) -> Tensor:
        if match := EXPERT.fullmatch(name):
            value = files.read(f"{match['experts']}.{int(match['expert']) // factor}.{match['parameter']}")
            return value * factor if scaled and match["parameter"].startswith("down") else value
        value = files.read(name)
        if ".moe.router." not in name:
            return value
        rows = value.repeat_interleave(factor, dim=0)
        if not noise:
            return rows
        std = noise * value.float().std()
        return rows + (draw_normal(rows.shape, "grow", seed, key_of_draws(name)) * std).to(rows.dtype)

    stay = {name: found.document[name] for name in ("family",) if name in found.document}
    origin = f"{path}, by `nlgmoe upcycle`"
    write_weights(checkpoint, read, config, found.tokenizer(), overwrite, origin, path, stay)
    return config


def _grown(before: GPTConfig, num_experts: int | list[int], top_k: int | None) -> tuple[GPTConfig, int]:
    """Return the new configuration, and the number of copies R."""
    moe = before.moe
    assert moe is not None
    old = experts_per_position(before)
    largest = max(old)
    new = num_experts if isinstance(num_experts, list) else [num_experts // largest * count for count in old]
    setting = f"num_experts={num_experts}"
    multiples = {count // previous for count, previous in zip(new, old, strict=len(new) == len(old)) if previous}
    factor = max(multiples, default=1)
    require(
        len(new) == len(old) and new == [count * factor for count in old] and factor > 1,
        f"{setting} is no multiple, the same for every MoE layer, of the mixture's {old if len(set(old)) > 1 else largest}",
    )
    chosen = moe.top_k if top_k is None else top_k
    require(
        chosen in (moe.top_k, factor * moe.top_k),
        f"top_k={chosen} must be the mixture's {moe.top_k}, or {factor} times as many, {factor * moe.top_k}",
    )
    require(
        moe.groups is None, f"groups={moe.groups} of the mixture: its copies would fill groups; growing supports null"
    )
    numbers = new if isinstance(moe.num_experts, list) or isinstance(num_experts, list) else new[0]
    second = moe.second_expert if chosen == moe.top_k else "argmax"  # a sampled one would be no copy of the first
    grown = replace(moe, num_experts=numbers, top_k=chosen, second_expert=second, normalize_weights=moe.normalizes)
    return replace(before, moe=grown), factor
