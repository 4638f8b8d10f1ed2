"""Settings of the optimizer, the schedule, the length of training, and the data."""

from __future__ import annotations

import math
import posixpath

from nlgmoe.tools.megatron.growth_settings import (
    curriculum_settings,
    ramp_up_settings,
    samples_of_steps,
    tokens_of_samples,
    whole_steps,
)
from nlgmoe.tools.megatron.job import DEFAULT, Job
from nlgmoe.tools.megatron.model_settings import tokenizer


def optimisation_settings(job: Job) -> None:
    """Set `model.optimizer.*` and `model.schedule.*`."""
    job.set_from_flags("Optimisation", "model.optimizer.lr")
    betas = [job.arguments.value(name) for name in ("--adam-beta1", "--adam-beta2")]
    if None not in betas:
        left = [name for name in ("--adam-beta1", "--adam-beta2") if name not in job.arguments.uses]
        job.set("model.optimizer.betas", betas, f"{' and '.join(left)}: {DEFAULT}" if left else "")
    job.set_from_flags("Optimisation", "model.optimizer.eps")
    job.set_from_flags("Optimisation", "model.optimizer.weight_decay")
    _schedule(job)


def _schedule(job: Job) -> None:
    shape = job.arguments.value("--lr-decay-style")
    warmup, decay = _warmup_tokens(job), _decay_tokens(job)
    if shape is None or warmup is None:
        return
    path = "model.schedule."
    job.set(f"{path}shape", "wsd" if shape == "linear" else shape, job.default("--lr-decay-style"))
    job.set(f"{path}warmup_tokens", warmup)
    if shape == "constant":
        if job.arguments.has("--min-lr", "--lr-decay-tokens", "--lr-decay-samples", "--lr-decay-iters"):
            job.result.notes.append("--lr-decay-style constant: --min-lr and --lr-decay-* have no effect.")
        return
    minimum = job.arguments.value("--min-lr")
    if minimum is not None:
        job.set(f"{path}min_lr", minimum, job.default("--min-lr"))
    if decay is None:
        job.arguments.problem(f"--lr-decay-style {shape}", "has no length; add --lr-decay-tokens")
        return
    given = job.arguments.has("--lr-decay-tokens", "--lr-decay-samples", "--lr-decay-iters")
    job.set(f"{path}decay_tokens", decay, "" if given else "the length of training")
    if shape == "linear":
        job.set(f"{path}cooldown_tokens", decay - warmup, "linear decay: the fall begins after the warm-up")


def _warmup_tokens(job: Job) -> int | None:
    """Length of the warm-up; a fraction is one of the decay in steps or sequences, as in Megatron."""
    if job.arguments.has("--lr-warmup-tokens"):
        tokens: int | None = job.arguments.value("--lr-warmup-tokens")
        return tokens
    fraction = job.arguments.value("--lr-warmup-fraction")
    if fraction is None:
        return _tokens_of(job, "--lr-warmup-samples", "--lr-warmup-iters")
    decay = _decay_samples(job)
    if decay is None or job.seq_len is None:
        job.arguments.refuse("--lr-warmup-fraction", "has no length to be a fraction of; give --lr-warmup-tokens")
        return None
    return tokens_of_samples(job, round(fraction * decay))


def _decay_tokens(job: Job) -> int | None:
    if job.arguments.has("--lr-decay-tokens"):
        tokens: int | None = job.arguments.value("--lr-decay-tokens")
        return tokens
    samples = _decay_samples(job)
    return None if samples is None else tokens_of_samples(job, samples)


def _decay_samples(job: Job) -> int | None:
    """Length of the decay in sequences; that of training where none is given."""
    for samples, iterations in (("--lr-decay-samples", "--lr-decay-iters"), ("--train-samples", "--train-iters")):
        if job.arguments.has(samples, iterations):
            return _samples_of(job, samples, iterations)
    return None


def _samples_of(job: Job, samples: str, iterations: str) -> int | None:
    """Return a length that is given in sequences or in steps, in sequences."""
    if job.arguments.has(iterations):
        steps = job.arguments.value(iterations)
        return None if steps is None else samples_of_steps(job, steps)
    value: int | None = job.arguments.value(samples)
    return value


def _tokens_of(job: Job, samples: str, iterations: str) -> int | None:
    count = _samples_of(job, samples, iterations)
    return None if count is None else tokens_of_samples(job, count)


def length_settings(job: Job) -> None:
    """Set the rest of `model.*`."""
    lengths = {}
    if (tokens := job.arguments.value("--train-tokens")) is not None:
        lengths["--train-tokens"] = tokens
    samples = job.arguments.value("--train-samples")
    trained = None if samples is None else whole_steps(job, samples)
    if trained is not None and (of_samples := tokens_of_samples(job, trained)) is not None:
        lengths["--train-samples"] = of_samples
    if lengths:
        first = min(lengths, key=lengths.__getitem__)
        comment = f"{first} comes before --train-samples" if len(lengths) > 1 and first == "--train-tokens" else ""
        job.set("model.train_tokens", lengths[first], comment or ("" if first == "--train-tokens" else f"of {first}"))
    curriculum_settings(job)
    job.set(
        "model.activation_checkpointing",
        job.arguments.has("--checkpoint-activations", "--deepspeed-activation-checkpointing"),
    )
    seed = job.arguments.value("--seed")
    if seed is not None:
        job.set("model.seed", seed, job.default("--seed"))


def data_settings(job: Job) -> None:
    """Set `data.*`."""
    if (found := tokenizer(job)) is not None:
        job.set("data.tokenizer", found[0], "kept in data.data_dir" if found[0] == "gpt2" else "")
    corpora, split = _corpora(job), _split(job)
    if corpora is not None and split is not None:
        _corpus(job, corpora, split)
    job.set_from_flags("Batch and data", "data.micro_batch_size")
    if job.global_batch is not None:
        comment = "" if job.arguments.has("--global-batch-size") else "micro-batch x ranks"
        job.set("data.global_batch_size", job.global_batch, comment)
    ramp_up_settings(job)
    _document_settings(job)
    job.set_from_flags("Batch and data", "data.num_workers")
    if "model.seed" in job.result.settings:
        job.set("data.seed", job.result.settings["model.seed"], job.default("--seed"))


def _corpora(job: Job) -> list[tuple[float, str]] | None:
    """Weight and prefix of each data set of `--data-path`; one prefix alone weighs 1."""
    words = job.arguments.required("--data-path")
    if words is None:
        return None
    if len(words) == 1:
        return [(1.0, words[0])]
    prefixes = words[1::2]
    try:
        weights = [float(word) for word in words[::2]]
    except ValueError:
        weights = []
    if len(weights) != len(prefixes) or not all(0 < weight < math.inf for weight in weights):
        job.arguments.refuse("--data-path", "is not a list of weight and prefix in turn, weights above 0; correct it")
        return None
    if twice := [prefix for prefix in prefixes if prefixes.count(prefix) > 1]:
        job.arguments.refuse("--data-path", f"names {twice[0]} twice; add up its weights")
        return None
    return list(zip(weights, prefixes, strict=True))


def _corpus(job: Job, corpora: list[tuple[float, str]], split: list[float]) -> None:
    """Set `data.corpus`: the data set, or the blend of several."""
    path, comment = "data.corpus.", job.default("--split")
    if len(corpora) == 1:
        job.set(f"{path}class_path", "nlgmoe.data.MegatronIndexed")
        job.set(f"{path}init_args.prefix", corpora[0][1])
        job.set(f"{path}init_args.split", split, comment)
        return
    names = [posixpath.basename(prefix).removesuffix("_text_document") for _, prefix in corpora]
    if len(set(names)) < len(names) or not all(names):
        names = [prefix.strip("/") for _, prefix in corpora]
    job.set(f"{path}class_path", "nlgmoe.data.Blend")
    job.set(
        f"{path}init_args.parts",
        [
            {
                "weight": weight,
                "name": name,
                "corpus": {
                    "class_path": "nlgmoe.data.MegatronIndexed",
                    "init_args": {"prefix": prefix, "split": split},
                },
            }
            for name, (weight, prefix) in zip(names, corpora, strict=True)
        ],
        f"splits: {comment}" if comment else "",
    )


def _document_settings(job: Job) -> None:
    resets = ["--reset-attention-mask", "--reset-position-ids"]
    given = [name for name in resets if job.arguments.has(name)]
    if len(given) == 1:
        (other,) = set(resets) - set(given)
        job.arguments.refuse(given[0], f"comes with {other} here, so that a document is read as if alone; add it")
    if given:
        job.set("data.document_attention", True)
    if job.arguments.has("--eod-mask-loss"):
        job.set("data.mask_eod_loss", True)


def _split(job: Job) -> list[float] | None:
    """Shares of training, validation and test, as numbers; missing ones are 0."""
    text = job.arguments.value("--split")
    try:
        shares = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        job.arguments.refuse("--split", "is not a list of numbers; correct it")
        return None
    shares = [*shares, 0.0, 0.0][:3]
    if not all(0 <= share < math.inf for share in shares):  # nor NaN
        job.arguments.refuse("--split", "has a share that is not a number from 0 on; correct it")
        return None
    if shares[1] == 0:
        job.arguments.refuse("--split", "leaves nothing to validate on; give the second share some documents")
    return [int(share) if share.is_integer() else share for share in shares]
