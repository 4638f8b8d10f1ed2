"""Commands on checkpoints: `nlgmoe verify`, `upcycle` and `prune`. Modules that need torch are imported by their functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from nlgmoe.cli.arguments import check_device, check_new_checkpoint, import_allowed
from nlgmoe.files import yaml_beside
from nlgmoe.validation import RunError, SettingError, require

if TYPE_CHECKING:
    from nlgmoe.checkpoint.reading import Checkpoint
    from nlgmoe.config import GPTConfig
    from nlgmoe.eval.importance import ExpertUse


def verify_checkpoint(checkpoint: str) -> None:
    """Read a whole checkpoint, compare it with its checksums and its model, and print its step, tokens and size.

    Args:
        checkpoint: the folder, `NAME.ckpt`.
    """
    from nlgmoe.checkpoint.reading import Checkpoint
    from nlgmoe.checkpoint.run_checkpoints import checkpoint_path, is_checkpoint, saved_steps
    from nlgmoe.checkpoint.verify import describe, find_problems

    if not Path(checkpoint).exists():
        raise SettingError(f"{checkpoint} does not exist; name a checkpoint")
    if not is_checkpoint(checkpoint) or not Path(checkpoint).is_dir():
        folder = Path(checkpoint)
        names = ", ".join(str(checkpoint_path(folder, step)) for step in saved_steps(folder)[:-4:-1])
        held = f"; it holds {names}" if names else ", and contains none"
        raise SettingError(f"{checkpoint} is not a checkpoint{held}")

    opened = Checkpoint(checkpoint)
    if problems := [problem.replace("\n", " ") for problem in find_problems(opened)]:
        raise RunError("\n".join([*problems, f"{checkpoint} is not valid: use another checkpoint"]))
    print(describe(opened))


def upcycle_checkpoint(
    source: list[str],
    checkpoint: str,
    num_experts: int | list[int] = 8,
    expert_interval: int | None = None,
    top_k: int | None = None,
    mlp_type: Literal["standard", "residual"] = "standard",
    residual_mix: Literal["learned", "sum", "sigmoid"] = "learned",
    granularity: int = 1,
    redraw: float = 0.0,
    rest: Literal["average", "first"] = "average",
    noise: float = 0.0,
    seed: int = 1234,
    overwrite: bool = False,
) -> None:
    """Make a mixture of dense models, or a larger one of a mixture.

    One dense model: experts are copies of its feed-forward layers, and the mixture computes the same at first.
    --granularity 4: shards of copies; many small experts of the same cost, which still compute the same at first.
    --redraw 0.5: copies of which half is drawn anew; a worse start, experts that differ at once.
    Several dense models: experts from each, to join what they have learned.
    A mixture: each expert several times, to grow it; the same at first with --top-k as many times as large.

    A Llama becomes a Mixtral, a Qwen3 a Qwen3-MoE, a Granite a GraniteMoe: every block has experts, two for each token, trained
    as those families are (dropless, second expert by argmax). Other models, and residual ones, become the paper's. Other
    weights and groups: `nlgmoe.surgery.upcycle.upcycle`.

    Set model.config.moe to the same values in a run that starts from the result with model.warm_start.checkpoint.

    Args:
        source: the checkpoint of a dense model or of a mixture, or the folder of its run; or several of dense models.
        checkpoint: output folder, `NAME.ckpt`.
        num_experts: experts of each MoE block, shards counted, or a list with one number for each.
        expert_interval: blocks from one MoE block to the next; default: 1 for a Llama, Qwen3 or Granite, else 2.
        top_k: experts per token; default: 2 for a Llama, Qwen3 or Granite, else 1, times the granularity; of a mixture: its own.
        mlp_type: standard, or residual (PR-MoE), which adds a shared expert.
        residual_mix: mix of routed experts and shared expert in a residual block, learned, sum or sigmoid.
        granularity: shards of each copy; it divides num_experts, top_k and the width of the feed-forward layers.
        redraw: share of each expert's inner units that is drawn anew (Drop-Upcycling), from 0 to 1.
        rest: with several dense models: the weights outside the experts, their average or those of the first.
        noise: noise added to the experts' matrices, as a multiple of each matrix's standard deviation, or for a mixture to the
            copied rows of its gates; it makes experts part earlier, and the result computes only nearly the same.
        seed: seed of all that is drawn, and of the gates.
        overwrite: replace an existing checkpoint.
    """
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
    from nlgmoe.config import MoEConfig
    from nlgmoe.surgery.grow import grow
    from nlgmoe.surgery.upcycle import Ways, upcycle
    from nlgmoe.tools.hugging_face.families import family_of

    parents = [find_checkpoint(path) for path in source]
    config = parents[0].config
    if config.moe is not None:
        require(len(parents) == 1, f"{parents[0].path} is no dense model: it has experts; several parents are dense")
        after = grow(parents[0], checkpoint, num_experts, top_k, noise, seed, overwrite)
        _print_upcycled(parents, checkpoint, config, after)
        return
    family, _ = family_of(config)
    native = family is not None and mlp_type == "standard"
    if expert_interval is None:
        expert_interval = 1 if native else 2
    if top_k is None:
        top_k = (2 if native else 1) * granularity
    of_family: dict[str, Any] = {"token_dropping": False} if native else {}
    if top_k == 2 and (native or granularity > 1):
        of_family["second_expert"] = "argmax"
    moe = MoEConfig(num_experts, expert_interval, top_k, mlp_type=mlp_type, residual_mix=residual_mix, **of_family)
    ways = Ways(granularity, redraw, rest, noise, seed)
    _print_upcycled(parents, checkpoint, config, upcycle(parents, checkpoint, moe, ways, overwrite))


def _print_upcycled(parents: Sequence[Checkpoint], checkpoint: str, before: GPTConfig, after: GPTConfig) -> None:
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.tools.hugging_face.families import FAMILIES, family_of

    old, new = (count_parameters(config) for config in (before, after))
    sizes = f"{new.total:,}, {new.active:,} for a token"
    print(
        f"{checkpoint}: {old.total:,} parameters of {', '.join(str(parent.path) for parent in parents)} have become {sizes}"
    )
    print(f"{yaml_beside(Path(checkpoint))}: its settings")
    became, reason = family_of(after)
    written = (
        f"with our code: {reason}" if became is None else f"as {FAMILIES[became].classes}ForCausalLM of transformers"
    )
    print(f"nlgmoe export writes it {written}")


def prune_checkpoint(
    run: str,
    checkpoint: str,
    *,
    num_experts: int | list[int],
    by: Literal["use", "reap", "first_order"] = "use",
    text: str | None = None,
    windows: int = 200,
    tokenizer: str | None = None,
    data_dir: str = "data/pocket_pile",
    device: str = "cpu",
    overwrite: bool = False,
    allow_code: list[str] | None = None,
) -> None:
    """Keep the experts that rank highest by use, by REAP or by the loss without them, and print the loss before and after.

    An expert's use is the sum of its weights over the tokens of the run's validation text, or of `text`. REAP (arXiv 2510.13999)
    ranks by the mean over the expert's tokens of its weight times the norm of its output. First order ranks by the change of
    the loss without the expert, to first order.

    Args:
        run: the folder of a run, or a checkpoint in it.
        checkpoint: output folder, `NAME.ckpt`.
        num_experts: experts to keep in each MoE layer, or one number for each MoE position, such as [8,8,16]; 0 where the model
            has a dense block.
        by: ranking of the experts, use, reap or first_order.
        text: file of plain text on which use is measured; default: the run's validation text.
        windows: sequences measured, of at most 2,048 tokens, of each domain of the run's validation text, or of `text`.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        data_dir: folder of tokenizers given by name.
        device: device of the model, such as cuda.
        overwrite: replace an existing checkpoint.
        allow_code: module of the checkpoint's router, expert or attention to import; may be given several times.
    """
    import_allowed(allow_code)
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    import torch

    from nlgmoe.checkpoint.portable import load_model
    from nlgmoe.checkpoint.reading import run_config
    from nlgmoe.eval.causes import first_order
    from nlgmoe.eval.importance import measure_use
    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.surgery.prune import best_ranked, prune, pruned_config
    from nlgmoe.tools.measured_text import measured_text

    check_device(device)
    loaded = load_pretrained(run, tokenizer, device, data_dir=data_dir)
    if Path(checkpoint).resolve() == loaded.path.resolve():
        raise SettingError(f"checkpoint={checkpoint} is the checkpoint to prune, the teacher afterwards; name another")
    before = loaded.model.config
    num_experts = _by_position(num_experts, before)
    after = pruned_config(before, num_experts)
    batches = measured_text(run_config(Path(run)), loaded, text, windows, tokenizer).batches
    use = measure_use(loaded.model, tqdm(batches, "measuring use", mininterval=1))
    if by == "first_order":
        changes = first_order(loaded.model, tqdm(batches, "measuring changes", mininterval=1)).layers
        scores = [torch.from_numpy(change.mean()) for change in changes]
    else:
        scores = use.weights if by == "use" else use.saliency
    kept = best_ranked(scores, after)
    path = loaded.path
    del loaded  # the device need not hold both models
    prune(path, checkpoint, num_experts, kept, overwrite)
    _print_kept(before, kept, use)
    loss = measure_use(load_model(checkpoint).to(device), tqdm(batches, "measuring loss", mininterval=1)).loss
    print(f"loss {use.loss:.4f} -> {loss:.4f} nats per token ({use.tokens:,} tokens)")
    sizes = [count_parameters(config).total for config in (before, after)]
    print(f"{checkpoint}: {sizes[0]:,} parameters of {path} have become {sizes[1]:,}")
    print(f"{yaml_beside(Path(checkpoint))}: its settings")


def _by_position(num_experts: int | list[int], before: GPTConfig) -> list[int]:
    """Return the number of experts to keep at each MoE position."""
    from nlgmoe.pyramid import experts_per_position

    if isinstance(num_experts, list):
        return num_experts
    return [min(num_experts, count) for count in experts_per_position(before)]


def _print_kept(before: GPTConfig, kept: Sequence[Sequence[int]], use: ExpertUse) -> None:
    from nlgmoe.pyramid import moe_blocks

    for block, experts, weights in zip(moe_blocks(before), kept, use.weights, strict=True):
        share = float(weights[experts].sum() / weights.sum())
        numbers = " ".join(map(str, experts))
        print(f"block {block}: {len(experts)} of {len(weights)} experts, with {share:.1%} of the weight: {numbers}")
