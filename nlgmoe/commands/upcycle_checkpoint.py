"""`nlgmoe upcycle`: convert a dense model's checkpoint into that of a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Literal

from nlgmoe.cli.arguments import check_new_checkpoint
from nlgmoe.files import settings_of


def upcycle_checkpoint(
    dense: str,
    checkpoint: str,
    num_experts: int | list[int] = 8,
    expert_interval: int = 2,
    top_k: int = 1,
    mlp_type: Literal["standard", "residual"] = "standard",
    residual_mix: Literal["learned", "sum"] = "learned",
    noise: float = 0.0,
    seed: int = 1234,
    overwrite: bool = False,
) -> None:
    """Copy each block's feed-forward layer into its experts, so that the MoE model computes the same as the dense one.

    Set model.config.moe to the same values in a run that starts from the result with model.warm_start.checkpoint.

    Args:
        dense: the checkpoint of a dense model, or the folder of its run.
        checkpoint: output folder, `NAME.ckpt`.
        num_experts: experts of each MoE block, or a list with one number for each.
        expert_interval: blocks from one MoE block to the next.
        top_k: experts per token.
        mlp_type: standard, or residual (PR-MoE), which adds a shared MLP.
        residual_mix: mix of experts and shared MLP in a residual block, learned or sum.
        noise: noise added to the experts' matrices, as a multiple of each matrix's standard deviation.
        seed: seed of the noise and the gates.
        overwrite: replace an existing checkpoint.
    """
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    from nlgmoe.checkpoint.upcycle import upcycle  # these need torch
    from nlgmoe.config import MoEConfig
    from nlgmoe.model.counting import count_parameters

    moe = MoEConfig(num_experts, expert_interval, top_k, mlp_type=mlp_type, residual_mix=residual_mix)
    upcycled = upcycle(dense, checkpoint, moe, noise, seed, overwrite)
    before, after = (count_parameters(config) for config in (upcycled.dense_config, upcycled.config))
    print(
        f"{checkpoint}: {before.total:,} parameters of {upcycled.dense} have become {after.total:,}, {after.active:,} for a token"
    )
    copies = "exact copies" if noise == 0 else f"copies with noise of {noise} times their standard deviation"
    print(f"{settings_of(Path(checkpoint))}: its settings")
    print(f"experts are {copies}; a run starts from them with model.warm_start.checkpoint={quote(checkpoint)}")
