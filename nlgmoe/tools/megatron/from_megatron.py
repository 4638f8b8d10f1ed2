"""`nlgmoe from-megatron`: translate the words of a launch of Megatron-DeepSpeed into a configuration.

Settings that take one flag's value unchanged come from the table (`flags.yaml`). Here the others of `model` and `data` are
computed, those of `trainer` in `trainer_settings.py`.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Sequence

from nlgmoe.cli.arguments import check_output, write_whole
from nlgmoe.tools.megatron.flags import Arguments, Translation
from nlgmoe.tools.megatron.trainer_settings import read_deepspeed_config, trainer_settings
from nlgmoe.validation import SettingError

_ENTRY_POINT = re.compile(r"(.*/)?pretrain_gpt\w*\.py")
GPT2_FILES, OWN_FILES = ["gpt2-vocab.json", "gpt2-merges.txt"], ["vocab.json", "merges.txt"]


def from_megatron(flags: list[str] | None = None, output: str | None = None, skip_unknown: bool = False) -> None:
    """Translate a launch of Megatron-DeepSpeed into YAML for `train.py fit --config`.

    Each flag becomes a setting, is listed in the header with the reason why it needs none, or is refused. Megatron's defaults
    are written as settings. The GPUs are those of the launcher's flags; without them, add a file of configs/hardware.

        nlgmoe from-megatron -- deepspeed --num_gpus 8 pretrain_gpt.py --num-layers 24 ...

    Args:
        flags: Megatron's flags, or the whole command from deepspeed on; write them after a bare --, without --flags.
        output: file to write; default: standard output.
        skip_unknown: list unknown flags in the header instead of refusing them.
    """
    if not flags:
        raise SettingError("give the flags of the launch after --, or its whole command from deepspeed on")
    if output is not None:
        check_output(output)
    text = translated(flags, skip_unknown)
    if output is None:
        print(text, end="")
    else:
        write_whole(output, text)
        print(f"{output}: its comments name what has no setting")


def translated(words: Sequence[str], skip_unknown: bool = False) -> str:
    """Translate a launch into YAML."""
    arguments = Arguments(split_command(words), skip_unknown)
    job = Translation(arguments)
    deepspeed = read_deepspeed_config(job)
    if job.seq_len is not None:
        job.set("model.config.seq_len", job.seq_len)
        positions = arguments.required("--max-position-embeddings")
        if positions is not None and positions < job.seq_len:
            arguments.refuse("--max-position-embeddings", f"is below --seq-length {job.seq_len}; make it as long")
    _model_config(job)
    _distiller(job)
    job.copy("Optimisation", "model.optimizer.lr")
    job.set("model.optimizer.betas", [arguments.value(name) for name in ("--adam-beta1", "--adam-beta2")])
    job.copy("Optimisation", "model.optimizer.")
    job.copy("Optimisation", "model.schedule.")
    _length(job)
    _tokenizer(job)
    _data(job)
    trainer_settings(job, deepspeed)
    text = job.text()
    if arguments.problems:
        raise SettingError("\n".join(arguments.problems))
    return text


def split_command(words: Sequence[str]) -> list[str]:
    """Return the flags of a command: those of its launcher that are in the table, and Megatron's."""
    at = [index for index, word in enumerate(words) if _ENTRY_POINT.fullmatch(word)]
    if not at:
        return list(words)
    launcher = Arguments(words[: at[0]], skip_unknown=True).given
    return [word for name, values in launcher.items() for word in (name, *values)] + list(words[at[0] + 1 :])


def _model_config(job: Translation) -> None:
    """Set `model.config`, but for the vocabulary and the sequence length."""
    job.copy("Model", "model.config.")
    if not job.is_moe:
        job.set("model.config.moe", None)
        return
    moe, arguments = "model.config.moe.", job.arguments
    job.set(f"{moe}num_experts", _experts(arguments.value("--num-experts")))
    job.copy("Experts", moe)
    dropping = not arguments.has("--disable-moe-token-dropping")
    job.set(f"{moe}token_dropping", dropping)
    job.set(f"{moe}eval_token_dropping", dropping)
    job.set(f"{moe}aux_scope", "rank")
    argmax = arguments.has("--disable-moe-top2-2nd-expert-sampling")
    if argmax or arguments.value("--topk") == 2:
        job.set(f"{moe}second_expert", "argmax" if argmax else "sample")


def _experts(counts: Sequence[int]) -> int | list[int]:
    """Return `num_experts`; Megatron builds a layer of one expert as a dense one, which is 0 here."""
    here = [0 if count == 1 else count for count in counts]
    return here if len(here) > 1 else here[0]


def _tokenizer(job: Translation) -> None:
    """Set the tokenizer, whose number of tokens `train.py` reads when it starts."""
    paths = [job.arguments.required(name) for name in ("--vocab-file", "--merge-file")]
    if None in paths:
        return
    (folder, vocabulary), (other, merges) = (posixpath.split(path) for path in paths)
    if [vocabulary, merges] == GPT2_FILES:
        job.set("data.tokenizer", "gpt2")
    elif [vocabulary, merges] == OWN_FILES and folder == other:
        job.set("data.tokenizer", folder or ".")
    else:
        job.arguments.refuse(
            "--vocab-file",
            f"needs GPT-2's files under the names {' and '.join(GPT2_FILES)}, which need not be there; or those of another "
            "tokenizer, vocab.json and merges.txt in one folder",
        )


def _distiller(job: Translation) -> None:
    if not job.arguments.has("--mos", "--kd"):
        return
    job.set("model.distiller.class_path", "nlgmoe.MixtureOfStudents")
    job.copy("Distillation", "model.distiller.")
    job.notes.append(
        "The teacher is a checkpoint of nlgmoe, and teaches to the end; StagedDistillation ends that (docs/distillation.md)."
    )


def _length(job: Translation) -> None:
    arguments = job.arguments
    lengths: list[int] = []
    if (tokens := arguments.value("--train-tokens")) is not None:
        lengths.append(tokens)
    samples = arguments.value("--train-samples")
    if samples is not None and job.seq_len is not None and job.global_batch is not None:
        ramp_up = arguments.has("--rampup-batch-size")  # then the last step may be a part of one
        lengths.append((samples if ramp_up else samples // job.global_batch * job.global_batch) * job.seq_len)
    if lengths:
        job.set("model.train_tokens", min(lengths))
    recompute = arguments.has("--checkpoint-activations", "--deepspeed-activation-checkpointing")
    job.set("model.activation_checkpointing", recompute)
    job.set("model.seed", arguments.value("--seed"))


def _data(job: Translation) -> None:
    arguments = job.arguments
    _corpus(job)
    job.copy("Batch and data", "data.")
    numbers = arguments.value("--rampup-batch-size")
    if numbers is not None and len(numbers) != 3:
        arguments.refuse("--rampup-batch-size", "takes a start, an increment and a number of sequences; correct it")
    elif numbers is not None and job.seq_len is not None:
        for name, value in zip(("start", "increment", "tokens"), (*numbers[:2], numbers[2] * job.seq_len), strict=True):
            job.set(f"data.batch_ramp_up.{name}", value)
        job.notes.append(
            "start and increment of the ramp-up must be multiples of a step's micro-batches (docs/scaling.md)."
        )
    job.set("data.seed", arguments.value("--seed"))


def _corpus(job: Translation) -> None:
    words, split = job.arguments.required("--data-path"), _split(job)
    if words is None or split is None:
        return
    words = ["1", *words] if len(words) == 1 else words
    try:
        weights = [float(word) for word in words[::2]]
    except ValueError:
        weights = [math.nan]
    prefixes = words[1::2]
    if len(weights) != len(prefixes) or not all(0 < weight < math.inf for weight in weights):
        job.arguments.refuse("--data-path", "is not a list of weight and prefix in turn, weights above 0; correct it")
        return
    if twice := [prefix for prefix in prefixes if prefixes.count(prefix) > 1]:
        job.arguments.refuse("--data-path", f"names {twice[0]} twice; add up its weights")
    corpora = [
        {"class_path": "nlgmoe.data.MegatronIndexed", "init_args": {"prefix": prefix, "split": [*split]}}
        for prefix in prefixes
    ]
    names = [posixpath.basename(prefix).removesuffix("_text_document") for prefix in prefixes]
    if len(set(names)) < len(names) or not all(names):
        names = [prefix.strip("/") for prefix in prefixes]
    keys = ("weight", "name", "corpus")
    parts = [dict(zip(keys, part, strict=True)) for part in zip(weights, names, corpora, strict=True)]
    blend = {"class_path": "nlgmoe.data.Blend", "init_args": {"parts": parts}}
    job.set("data.corpus", blend if len(parts) > 1 else corpora[0])


def _split(job: Translation) -> list[float] | None:
    """Return the shares of training, validation and test; missing ones are 0."""
    text = job.arguments.value("--split")
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [math.nan]
    shares = [*shares, 0.0, 0.0][:3]
    if not all(0 <= share < math.inf for share in shares) or shares[1] == 0:
        job.arguments.refuse("--split", "must be numbers from 0 on, with a second share to validate on; correct it")
        return None
    return [int(share) if share.is_integer() else share for share in shares]
