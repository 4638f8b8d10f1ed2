"""`nlgmoe upcycle`: a mixture of experts from the checkpoint of a dense model."""

from __future__ import annotations

from typing import Literal

from nlgmoe.tools.hugging_face.import_checkpoint import check_new_checkpoint


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
    """Make every expert a copy of its block's feed-forward layer, so that the mixture computes what the dense model does.

    The settings are those of model.config.moe in the run that starts from it, with model.warm_start.checkpoint.

    Args:
        dense: the checkpoint of a dense model, or the folder of its run.
        checkpoint: that is written, `NAME.ckpt`.
        num_experts: of each MoE block, or a list with one number for each.
        expert_interval: blocks from one MoE block to the next.
        top_k: experts of a token.
        mlp_type: standard, or residual (PR-MoE): a shared MLP beside the experts.
        residual_mix: how a residual block joins the two, learned or sum.
        noise: added to the experts' matrices, as a multiple of each one's own standard deviation.
        seed: of the noise and the gates.
        overwrite: replace the checkpoint if there is one of that name.

    Raises:
        ValueError: there is no such checkpoint, it is not dense, or the experts do not fit it.
    """
    check_new_checkpoint(checkpoint, overwrite)
    from nlgmoe.checkpoint.upcycle import upcycle  # these need torch
    from nlgmoe.config import MoEConfig
    from nlgmoe.model.counting import count_parameters

    moe = MoEConfig(num_experts, expert_interval, top_k, mlp_type=mlp_type, residual_mix=residual_mix)
    done = upcycle(dense, checkpoint, moe, noise, seed)
    before, after = (count_parameters(config) for config in (done.dense_config, done.config))
    print(
        f"{checkpoint}: {before.total:,} parameters of {done.dense} have become {after.total:,}, {after.active:,} for a token"
    )
    copies = "exact copies" if noise == 0 else f"copies with noise of {noise} times their standard deviation"
    print(f"experts are {copies}; a run starts from them with model.warm_start.checkpoint={checkpoint}")
