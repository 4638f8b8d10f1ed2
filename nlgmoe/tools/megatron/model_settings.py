"""Settings of the model: its shape, its tokenizer's vocabulary, its experts."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path

from nlgmoe.tools.megatron.job import Job

GPT2_FILES = {"--vocab-file": "gpt2-vocab.json", "--merge-file": "gpt2-merges.txt"}
GPT2_VOCABULARY = 50257


def model_settings(job: Job) -> None:
    """Set `model.config.*` and `model.distiller`."""
    vocabulary = tokenizer(job)
    if vocabulary is not None:
        job.set("model.config.vocab_size", vocabulary[1], "of the tokenizer; padding is not counted")
    if job.seq_len is not None:
        job.set("model.config.seq_len", job.seq_len)
        positions = job.arguments.required("--max-position-embeddings")
        if positions is not None and positions < job.seq_len:
            job.arguments.refuse("--max-position-embeddings", f"is below --seq-length {job.seq_len}; make it as long")
    job.set_from_flags("Model", "model.config.")
    if job.is_moe:
        _moe_settings(job)
    else:
        job.set("model.config.moe", None, "one expert: a dense model")
    if job.has_teacher:
        job.set(
            "model.distiller.class_path", "nlgmoe.MixtureOfStudents", "to the end; StagedDistillation ends it earlier"
        )
        job.set_from_flags("Distillation", "model.distiller.")
        experts = job.arguments.value("--num-experts-teacher")
        if experts is not None:
            counts = [0 if count == 1 else count for count in experts]  # one expert there is a dense layer
            job.set("model.distiller.init_args.num_experts", counts if len(counts) > 1 else counts[0])


def _moe_settings(job: Job) -> None:
    experts = job.experts
    assert experts
    counts = [0 if count == 1 else count for count in experts]  # Megatron builds a layer of one expert as a dense one
    job.set("model.config.moe.num_experts", counts if len(counts) > 1 else experts[0])
    job.set_from_flags("Experts", "model.config.moe.")
    moe = "model.config.moe."
    dropless = job.arguments.has("--disable-moe-token-dropping")
    job.set(f"{moe}token_dropping", not dropless)
    job.set(
        f"{moe}eval_token_dropping",
        not dropless,
        "" if dropless else "as Megatron-DeepSpeed evaluates; false makes a sequence's loss independent of its batch",
    )
    job.set(f"{moe}aux_scope", "rank", "as DeepSpeed balances the load; global: over all ranks")
    if job.arguments.value("--topk") == 2:
        argmax = job.arguments.has("--disable-moe-top2-2nd-expert-sampling")
        job.set(f"{moe}second_expert", "argmax" if argmax else "sample")


def tokenizer(job: Job) -> tuple[str, int] | None:
    """(our name of the tokenizer, its number of tokens)."""
    job.arguments.value("--tokenizer-type")
    paths = {name: job.arguments.required(name) for name in GPT2_FILES}
    if None in paths.values():
        return None
    if all(posixpath.basename(path) == GPT2_FILES[name] for name, path in paths.items()):
        return "gpt2", GPT2_VOCABULARY
    folders = {posixpath.dirname(path) or "." for path in paths.values()}
    files = [posixpath.basename(path) for path in paths.values()]
    if files != ["vocab.json", "merges.txt"] or len(folders) > 1:
        job.arguments.refuse(
            "--vocab-file", "is not found by that name here; put vocab.json and merges.txt into one folder"
        )
        return None
    folder = folders.pop()
    try:
        return folder, max(json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8")).values()) + 1
    except (OSError, ValueError, AttributeError) as error:
        job.arguments.refuse(
            "--vocab-file", f"is needed to count its tokens ({error}); translate the script where it can be read"
        )
        return None
