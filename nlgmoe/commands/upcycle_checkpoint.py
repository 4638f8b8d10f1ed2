"""`nlgmoe upcycle`: convert a dense model's checkpoint into that of a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from nlgmoe.cli.arguments import check_new_checkpoint
from nlgmoe.files import yaml_beside

if TYPE_CHECKING:
    from nlgmoe.surgery.upcycle import Upcycled


def upcycle_checkpoint(
    dense: str,
    checkpoint: str,
    num_experts: int | list[int] = 8,
    expert_interval: int | None = None,
    top_k: int | None = None,
    mlp_type: Literal["standard", "residual"] = "standard",
    residual_mix: Literal["learned", "sum", "sigmoid"] = "learned",
    noise: float = 0.0,
    seed: int = 1234,
    overwrite: bool = False,
) -> None:
    """Copy each block's feed-forward layer into its experts, so that the MoE model computes the same as the dense one.

    A Llama becomes a Mixtral, a Qwen3 a Qwen3-MoE, a Granite a GraniteMoe: every block has experts, two for each token, trained
    as those families are (dropless, second expert by argmax). Other models, and residual ones, become the paper's. Other routers,
    weights and groups: `nlgmoe.surgery.upcycle.upcycle`.

    Set model.config.moe to the same values in a run that starts from the result with model.warm_start.checkpoint.

    Args:
        dense: the checkpoint of a dense model, or the folder of its run.
        checkpoint: output folder, `NAME.ckpt`.
        num_experts: experts of each MoE block, or a list with one number for each.
        expert_interval: blocks from one MoE block to the next; default: 1 for a Llama, Qwen3 or Granite, else 2.
        top_k: experts per token; default: 2 for a Llama, Qwen3 or Granite, else 1.
        mlp_type: standard, or residual (PR-MoE), which adds a shared MLP.
        residual_mix: mix of experts and shared MLP in a residual block, learned, sum or sigmoid.
        noise: noise added to the experts' matrices, as a multiple of each matrix's standard deviation; it makes experts part
            earlier, and the result computes only nearly the same as the dense model.
        seed: seed of the noise and the gates.
        overwrite: replace an existing checkpoint.
    """
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    from nlgmoe.checkpoint.reading import read_document  # these need torch
    from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
    from nlgmoe.config import GPTConfig, MoEConfig
    from nlgmoe.surgery.upcycle import upcycle
    from nlgmoe.tools.hugging_face.families import family_of

    path = find_checkpoint(dense)
    family, _ = family_of(GPTConfig.from_dict(read_document(path)["model_config"]))
    native = family is not None and mlp_type == "standard"
    if expert_interval is None:
        expert_interval = 1 if native else 2
    if top_k is None:
        top_k = 2 if native else 1
    of_family: dict[str, Any] = {"token_dropping": False} if native else {}
    if native and top_k == 2:
        of_family["second_expert"] = "argmax"
    moe = MoEConfig(num_experts, expert_interval, top_k, mlp_type=mlp_type, residual_mix=residual_mix, **of_family)
    upcycled = upcycle(path, checkpoint, moe, noise, seed, overwrite)
    _print_upcycled(upcycled, checkpoint, had_family=family is not None)
    copies = "exact copies" if noise == 0 else f"copies with noise of {noise} times their standard deviation"
    print(f"{yaml_beside(Path(checkpoint))}: its settings")
    print(f"experts are {copies}; a run starts from them with model.warm_start.checkpoint={quote(checkpoint)}")


def _print_upcycled(upcycled: Upcycled, checkpoint: str, had_family: bool) -> None:
    """Print the sizes, and how the result is exported."""
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.tools.hugging_face.families import FAMILIES, family_of

    before, after = (count_parameters(config) for config in (upcycled.dense_config, upcycled.config))
    print(
        f"{checkpoint}: {before.total:,} parameters of {upcycled.dense} have become {after.total:,}, {after.active:,} for a token"
    )
    became, reason = family_of(upcycled.config)
    if became is not None:
        print(f"nlgmoe export writes it as {FAMILIES[became].classes}ForCausalLM of transformers")
    elif had_family:
        print(
            f"no class of transformers has {reason}: nlgmoe export writes it with our code; leave out --expert-interval for a "
            "native class"
        )
