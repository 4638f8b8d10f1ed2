"""`nlgmoe import-megatron`: a Megatron-DeepSpeed checkpoint as one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nlgmoe.cli.errors import UsageError


def import_megatron(
    checkpoint: str,
    output: str,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    data_dir: str = "data/pocket_pile",
    qkv: Literal["auto", "heads", "thirds"] = "auto",
    accept_tanh_gelu: bool = False,
) -> None:
    """Turn a Megatron-DeepSpeed checkpoint (dense, MoE or PR-MoE) into a portable one that holds weights only.

    The files are read and nothing in them is run; what this project's model cannot be is refused by name. The new checkpoint
    can be evaluated, generated from, and named in `model.warm_start.checkpoint`.

    Args:
        checkpoint: the folder of a step, such as OUT/global_step1000, or the one with the file `latest`.
        output: the checkpoint to write, NAME.ckpt.
        vocab_size: ids to keep, the rest of the embedding is padding; by default those of the tokenizer, without one all rows.
        tokenizer: as `data.tokenizer`, to go with the checkpoint: gpt2 for the tutorial's models.
        data_dir: where tokenizers that are given by name are kept.
        qkv: how queries, keys and values lie in a weight: `heads` by turns for each head, `thirds` one after the other; `auto`
            tells by the checkpoint's version and arguments. A wrong one shows as a loss like an untrained model's.
        accept_tanh_gelu: take a model trained with --no-bias-gelu-fusion, whose exact GELU becomes the tanh form.

    Raises:
        ValueError: the checkpoint is damaged or incomplete, or a model of another kind.
    """
    from nlgmoe.checkpoint.describe import describe
    from nlgmoe.data.tokenizer import load_tokenizer
    from nlgmoe.tools.megatron.checkpoint.importing import import_checkpoint  # these need torch

    if Path(output).suffix != ".ckpt":
        raise UsageError(f"output={output} must end in .ckpt")
    if Path(output).exists():
        raise UsageError(f"output={output} exists already; name another, or delete it")
    found = None if tokenizer is None else load_tokenizer(tokenizer, Path(data_dir))
    if found is not None and vocab_size is None:
        vocab_size = found.vocab_size
    if found is not None and vocab_size is not None and found.vocab_size > vocab_size:
        raise UsageError(
            f"vocab_size={vocab_size} is below the {found.vocab_size} ids of tokenizer {found.name}; leave it out"
        )
    text = None if found is None else found.to_json()
    import_checkpoint(checkpoint, output, vocab_size, text, qkv, accept_tanh_gelu)
    print(describe(Path(output)))
