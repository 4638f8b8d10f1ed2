"""`nlgmoe distill-logits`: record a teacher's logits for the samples of a run, once for many runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from nlgmoe.cli.arguments import import_allowed
from nlgmoe.validation import SettingError, require

if TYPE_CHECKING:
    from nlgmoe.checkpoint.reading import Checkpoint
    from nlgmoe.distill.mixture_of_students import MixtureOfStudents
    from nlgmoe.distill.record_logits import Progress
    from nlgmoe.experiment import Experiment


def distill_logits(
    files: list[str],
    *,
    output: str,
    teacher: str | None = None,
    top_k: int = 64,
    samples: int | None = None,
    temperature: float | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    allow_code: list[str] | None = None,
) -> None:
    """Record a teacher's most likely next tokens at every position on which a student will be distilled.

    Training with `nlgmoe.OfflineTeacher` then needs no teacher. The same command resumes a recording that was stopped, and
    writes the same bytes.

    Args:
        files: the student's YAML files, as for train.py; later ones override earlier ones. They determine the samples.
        output: new folder.
        teacher: checkpoint, or run folder with its newest valid checkpoint; default: that of model.distiller.
        top_k: tokens recorded for each position; the others are one class, the tail.
        samples: training samples to record, from the run's first one on; default: as many as the configuration distils.
        temperature: temperature of the distributions; default: that of model.distiller, else 1.
        precision: precision of the teacher, fp32 or bf16; default: that of model.distiller, else fp32.
        allow_code: module of the checkpoint's router, expert or attention to import; may be given several times.
    """
    _check_arguments(output, top_k, samples, temperature)
    import_allowed(allow_code)
    # Imported here: Lightning loads slowly, and wrong arguments are reported before it is needed.
    import torch

    from nlgmoe.distill.mixture_of_students import MixtureOfStudents
    from nlgmoe.distill.record_logits import record_logits
    from nlgmoe.experiment import ONE_PROCESS, load_config, parse_config

    settings = parse_config(files)
    distiller: dict[str, Any] = (settings["model"]["distiller"] or {}).get("init_args") or {}
    teacher = teacher or distiller.get("teacher")
    if teacher is None:
        raise SettingError("missing setting teacher (its checkpoint); give it as --teacher=...")
    temperature = distiller.get("temperature", 1.0) if temperature is None else temperature
    precision = precision or distiller.get("precision") or "fp32"

    # One process reads all samples in micro-batches, regardless of the steps and ranks of the run.
    experiment = load_config(files, **ONE_PROCESS, data__global_batch_size=None, data__batch_ramp_up=None)
    module, data = experiment.module, experiment.data
    if top_k > module.config.vocab_size:
        raise SettingError(f"top_k={top_k} is above model.config.vocab_size={module.config.vocab_size}; lower it")
    if samples is None:
        samples = _count_distilled_samples(experiment, settings)
    data.prepare_data()
    data.setup()
    teacher_model = MixtureOfStudents(teacher, temperature=temperature, precision=precision)
    like = torch.empty(0, device=experiment.trainer.strategy.root_device)
    found = teacher_model.load(module.config, like, data)
    recipe = _recipe(teacher_model, found, experiment)
    recipe |= {"precision": precision, "top_k": top_k, "temperature": temperature, "samples": samples}
    with tqdm(desc="recording", total=samples, unit=" samples", mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        done = record_logits(teacher_model, data, recipe, Path(output), lambda at: bar.update(at.samples - bar.n))
    _print_recorded(found, recipe, output, done)


def _check_arguments(output: str, top_k: int, samples: int | None, temperature: float | None) -> None:
    require(bool(Path(output).name), f"output={output} is not the name of a folder; name a new one")
    if temperature is not None and not temperature > 0:
        raise SettingError(f"temperature={temperature} must be above 0; 1.0 records the distributions as they are")
    require(top_k >= 1, f"top_k={top_k} must be at least 1")
    require(samples is None or samples >= 1, f"samples={samples} must be at least 1")


def _print_recorded(teacher: Checkpoint, recipe: dict[str, Any], output: str, done: Progress) -> None:
    from nlgmoe.distill.offline_teacher import record_type

    record_bytes, samples, seq_len = record_type(recipe).itemsize, recipe["samples"], recipe["seq_len"]
    print(f"teacher    {teacher.path}, step {teacher.document['global_step']:,}, {recipe['precision']}")
    print(f"samples    {samples:,} of {seq_len:,} tokens")
    print(f"logits     {output}, {samples * record_bytes / 1e6:,.1f} MB, {record_bytes / seq_len:,.1f} bytes a token")
    if done.positions:
        tail, top_k = done.tail_mass / done.positions, recipe["top_k"]
        print(f"tail       {tail:.4f} of the probability is outside the {top_k} likeliest tokens, on average")


def _recipe(teacher: MixtureOfStudents, found: Checkpoint, experiment: Experiment) -> dict[str, Any]:
    """Return what determines the records, except the command's own settings."""
    module, data = experiment.module, experiment.data
    clock = {"step": found.document["global_step"], "tokens": found.document["tokens_seen"]}
    return {
        "teacher": {"checkpoint": str(found.path), "weights": teacher.state_dict()["weights"], **clock},
        "data": data.fingerprint(),
        "document_attention": data.document_attention,
        "vocab_size": module.config.vocab_size,
        "seq_len": data.seq_len,
        "micro_batch_size": data.micro_batch_size,
        "loss_chunk_size": module.loss_chunk_size,
    }


def _count_distilled_samples(experiment: Experiment, settings: dict[str, Any]) -> int:
    """Return the samples of the run until it or its distillation ends."""
    from nlgmoe.data import BatchRampUp
    from nlgmoe.data.sampling import batch_size_after
    from nlgmoe.distill.distiller import distillation_end, samples_before_end
    from nlgmoe.tools.planner.topology import layout

    module, seq_len = experiment.module, experiment.data.seq_len
    growth = settings["data"]["batch_ramp_up"]
    full_batch_size = settings["data"]["global_batch_size"] or layout(settings, {}).global_batch_size
    ramp_up = None if growth is None else BatchRampUp(**growth)

    def batch_size(taken: int) -> int:
        return batch_size_after(taken, seq_len, full_batch_size, ramp_up)

    end = distillation_end(module.train_tokens, experiment.trainer)
    samples = samples_before_end(end, batch_size, seq_len, module.curriculum)
    if samples is None:
        raise SettingError("samples=null: the run has neither model.train_tokens nor trainer.max_steps; give --samples")
    return samples
