"""`nlgmoe prune`: remove the least used experts, for example to make a pyramid from a standard MoE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from nlgmoe.checkpoint.folder import run_config
from nlgmoe.cli.arguments import check_new_checkpoint, import_allowed
from nlgmoe.files import settings_of
from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from nlgmoe.eval.loaded_model import LoadedModel

BATCH, LENGTH = 8, 2048  # sequences of `text` at a time, and their tokens, at most


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
        windows: sequences measured, of each domain of the run's validation text, or of `text`.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        data_dir: folder of tokenizers given by name.
        overwrite: replace an existing checkpoint.
        allow_code: module of the checkpoint's expert to import; may be given several times.
    """
    import_allowed(allow_code)
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    if windows < 1:
        raise SettingError(f"windows={windows} must be at least 1 sequence")
    from nlgmoe.checkpoint.portable import load_model  # these need torch
    from nlgmoe.checkpoint.prune import most_used, prune, pruned_config
    from nlgmoe.eval.expert_use import measure_use
    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.pyramid import experts_per_position, moe_blocks

    loaded = load_pretrained(run, tokenizer, data_dir=data_dir)
    if Path(checkpoint).resolve() == loaded.path.resolve():
        raise SettingError(
            f"checkpoint={checkpoint} is the checkpoint to prune, the teacher of later training; name another"
        )
    before = loaded.model.config
    if isinstance(num_experts, int):
        largest = max(experts_per_position(before), default=0)
        if num_experts >= largest:
            raise SettingError(f"num_experts={num_experts} must be below {largest}, the experts that the model has")
        num_experts = [min(num_experts, count) for count in experts_per_position(before)]
    after = pruned_config(before, num_experts)
    batches = list(_text_batches(text, loaded, windows) if text is not None else _run_batches(run, windows, tokenizer))
    use = measure_use(loaded.model, batches)
    kept = most_used(use.weights if by == "use" else use.saliency, after)
    prune(loaded.path, checkpoint, num_experts, kept, overwrite)

    for block, experts, weights in zip(moe_blocks(before), kept, use.weights, strict=True):
        share = float(weights[experts].sum() / weights.sum())
        numbers = " ".join(map(str, experts))
        print(f"block {block}: {len(experts)} of {len(weights)} experts, with {share:.1%} of the weight: {numbers}")
    loss = measure_use(load_model(Path(checkpoint)), batches).loss
    sizes = [count_parameters(config).total for config in (before, after)]
    print(f"loss {use.loss:.4f} -> {loss:.4f} nats per token ({use.tokens:,} tokens)")
    print(f"{checkpoint}: {sizes[0]:,} parameters of {loaded.path} have become {sizes[1]:,}")
    settings = settings_of(Path(checkpoint))
    print(f"{settings}: its settings")
    files = [run_config(Path(run)) or "CONFIG", settings]  # the later one overrides
    print(
        f"to continue training, with the unpruned model as teacher: python train.py fit "
        f"{' '.join(f'--config {quote(str(file))}' for file in files)} --model.distiller nlgmoe.MixtureOfStudents "
        f"--model.distiller.init_args.teacher {quote(str(loaded.path))}"
    )


def _run_batches(run: str, windows: int, tokenizer: str | None) -> Any:
    from nlgmoe.experiment import ONE_PROCESS, load_config

    if (config := run_config(Path(run))) is None:
        raise SettingError(
            f"run={run} is in no run's folder: there is no config.yaml that names its text; give --text FILE"
        )
    changes = {"data__max_eval_windows": windows} | ({} if tokenizer is None else {"data__tokenizer": tokenizer})
    # Of the trainer nothing is used, but it must fit this machine.
    data = load_config(config, **ONE_PROCESS, trainer__accelerator="cpu", trainer__logger=False, **changes).data
    data.prepare_data()
    return data.val_dataloader()


def _text_batches(text: str, loaded: LoadedModel, windows: int) -> Iterator[Any]:
    import torch

    from nlgmoe.data.documents import UnusableError, decode_text

    try:
        ids = loaded.tokenizer.encode(decode_text(Path(text).read_bytes()))
    except (OSError, UnusableError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"text={text} cannot be read ({reason}); give a file of text in UTF-8") from error
    length = min(loaded.model.config.seq_len, LENGTH)
    count = min(windows, (len(ids) - 1) // length)
    if count < 1:
        raise SettingError(f"text={text} has {len(ids)} tokens, fewer than one sequence of {length}; give more text")
    tokens, targets = (torch.tensor(ids[i : i + count * length]).view(count, length) for i in (0, 1))
    for batch_tokens, batch_targets in zip(tokens.split(BATCH), targets.split(BATCH), strict=True):
        mask = torch.ones_like(batch_tokens, dtype=torch.bool)
        yield {
            "tokens": batch_tokens,
            "targets": batch_targets,
            "token_mask": mask,
            "domain": torch.zeros(len(batch_tokens), dtype=torch.long),
        }
