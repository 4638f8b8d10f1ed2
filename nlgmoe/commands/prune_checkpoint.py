"""`nlgmoe prune`: remove the least used experts, for example to make a pyramid from a standard MoE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

from nlgmoe.checkpoint.reading import run_config
from nlgmoe.cli.arguments import check_device, check_new_checkpoint, import_allowed
from nlgmoe.files import yaml_beside
from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from nlgmoe.batch import Batch
    from nlgmoe.config import GPTConfig
    from nlgmoe.eval.importance import ExpertUse


def prune_checkpoint(
    run: str,
    checkpoint: str,
    *,
    num_experts: int | list[int],
    by: Literal["use", "reap"] = "use",
    text: str | None = None,
    windows: int = 200,
    tokenizer: str | None = None,
    data_dir: str = "data/pocket_pile",
    device: str = "cpu",
    overwrite: bool = False,
    allow_code: list[str] | None = None,
) -> None:
    """Keep the experts that a model uses most, and print the loss before and after.

    An expert's use is the sum of its weights over the tokens of the run's validation text, or of `text`. REAP (arXiv 2510.13999)
    ranks by the mean over the expert's tokens of its weight times the norm of its output.

    Args:
        run: the folder of a run, or a checkpoint in it.
        checkpoint: output folder, `NAME.ckpt`.
        num_experts: experts to keep in each MoE layer, or one number for each MoE position, such as [8,8,16]; 0 where the model
            has a dense block.
        by: ranking of the experts, use or reap.
        text: file of plain text on which use is measured; default: the run's validation text.
        windows: sequences measured, of at most 2,048 tokens, of each domain of the run's validation text, or of `text`.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        data_dir: folder of tokenizers given by name.
        device: device of the model, such as cuda.
        overwrite: replace an existing checkpoint.
        allow_code: module of the checkpoint's expert or attention to import; may be given several times.
    """
    import_allowed(allow_code)
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    from nlgmoe.commands.measured_text import read_batches, with_progress  # these need torch
    from nlgmoe.eval.importance import measure_use
    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.surgery.prune import most_used, prune, pruned_config

    check_device(device)
    loaded = load_pretrained(run, tokenizer, device, data_dir=data_dir)
    if Path(checkpoint).resolve() == loaded.path.resolve():
        raise SettingError(
            f"checkpoint={checkpoint} is the checkpoint to prune, the teacher of later training; name another"
        )
    before = loaded.model.config
    num_experts = _by_position(num_experts, before)
    after = pruned_config(before, num_experts)
    batches = read_batches(run_config(Path(run)), loaded, text, windows, tokenizer)
    use = measure_use(loaded.model, with_progress(batches, "measuring use"))
    kept = most_used(use.weights if by == "use" else use.saliency, after)
    path, tokens_seen = loaded.path, loaded.document["tokens_seen"]
    del loaded  # the device need not hold both models
    prune(path, checkpoint, num_experts, kept, overwrite)
    _print_kept(before, kept, use)
    loss = _loss_of(Path(checkpoint), device, with_progress(batches, "measuring loss"))
    print(f"loss {use.loss:.4f} -> {loss:.4f} nats per token ({use.tokens:,} tokens)")
    print(f"{checkpoint}: {_size(before):,} parameters of {path} have become {_size(after):,}")
    _print_command(run_config(Path(run)), Path(checkpoint), path, tokens_seen)


def _by_position(num_experts: int | list[int], before: GPTConfig) -> list[int]:
    """Return the number of experts to keep at each MoE position."""
    from nlgmoe.pyramid import experts_per_position

    if isinstance(num_experts, list):
        return num_experts
    largest = max(experts_per_position(before), default=0)
    if num_experts >= largest:
        raise SettingError(f"num_experts={num_experts} must be below {largest}, the experts that the model has")
    return [min(num_experts, count) for count in experts_per_position(before)]


def _loss_of(checkpoint: Path, device: str, batches: Iterable[Batch]) -> float:
    from nlgmoe.checkpoint.portable import load_model
    from nlgmoe.eval.importance import measure_use

    return measure_use(load_model(checkpoint).to(device), batches).loss


def _size(config: GPTConfig) -> int:
    from nlgmoe.model.counting import count_parameters

    return count_parameters(config).total


def _print_kept(before: GPTConfig, kept: Sequence[Sequence[int]], use: ExpertUse) -> None:
    from nlgmoe.pyramid import moe_blocks

    for block, experts, weights in zip(moe_blocks(before), kept, use.weights, strict=True):
        share = float(weights[experts].sum() / weights.sum())
        numbers = " ".join(map(str, experts))
        print(f"block {block}: {len(experts)} of {len(weights)} experts, with {share:.1%} of the weight: {numbers}")


def _print_command(config: Path | None, checkpoint: Path, unpruned: Path, tokens_seen: int) -> None:
    """Print the command that trains the pruned model on."""
    settings, teacher = yaml_beside(checkpoint), quote(str(unpruned))
    print(f"{settings}: its settings")
    files = [config or "CONFIG", settings]  # the later one overrides
    print(
        f"to continue training, with the unpruned model as teacher: nlgmoe fit "
        f"{' '.join(f'--config {quote(str(file))}' for file in files)} "
        f"{_healing(config, tokens_seen)} --model.distiller nlgmoe.MixtureOfStudents "
        f"--model.distiller.init_args.teacher {teacher}"
    )


def _healing(config: Path | None, trained: int) -> str:
    """Return options for the schedule: a cosine over a tenth of the tokens, from the rate at which the training ended to 0.

    If that was 0, the cosine starts at a tenth of the peak. Another order of the text: a run begins with the text that the model
    was trained on first. Words stand for what no run tells.
    """
    rate, tokens, order = "RATE", "N", ""
    if config is not None and config.name == "config.yaml":
        from nlgmoe.experiment import parse_config
        from nlgmoe.optim.token_schedule import LearningRateSchedule, learning_rate

        settings = parse_config(config)
        model, order = settings["model"], f" --data.seed {settings['data']['seed'] + 1}"
        peak = model["optimizer"]["lr"]
        rate = f"{learning_rate(trained, peak, LearningRateSchedule(**model['schedule'])) or peak / 10:.3g}"
        tokens = str(max(1, trained // 10))
    return (
        f"--model.optimizer.lr {rate} --model.schedule.shape cosine --model.schedule.decay_tokens {tokens} "
        f"--model.train_tokens {tokens}{order}"
    )
