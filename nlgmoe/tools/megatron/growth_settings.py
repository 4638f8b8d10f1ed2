"""Settings of growing batches and sequences.

`nlgmoe.data` is imported only where a batch grows: it imports Lightning, which takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from nlgmoe.optim.token_schedule import SequenceCurriculum, sequence_length
from nlgmoe.tools.megatron.job import Job

if TYPE_CHECKING:
    from nlgmoe.data.accumulation import BatchRampUp


def ramp_up_settings(job: Job) -> None:
    """Set `data.batch_ramp_up`."""
    ramp_up = _ramp_up(job)
    if ramp_up is None:
        return
    from nlgmoe.data.accumulation import check_ramp_up

    micro_batch = job.arguments.value("--micro-batch-size")
    if micro_batch is not None:
        try:
            check_ramp_up(ramp_up, job.global_batch, micro_batch)
        except ValueError as error:
            job.arguments.refuse("--rampup-batch-size", f"is not possible here; {error}")
    job.set("data.batch_ramp_up.start", ramp_up.start)
    job.set("data.batch_ramp_up.increment", ramp_up.increment)
    assert job.seq_len is not None
    job.set("data.batch_ramp_up.tokens", ramp_up.tokens, f"{ramp_up.tokens // job.seq_len} sequences")


def curriculum_settings(job: Job) -> None:
    """Set `model.curriculum`; DeepSpeed's steps become tokens by the mean length of sequences during the curriculum."""
    curriculum = job.deepspeed.curriculum
    if curriculum is None or job.seq_len is None or job.global_batch is None:
        return
    problem = ""
    if curriculum.kind != ("seqlen", "fixed_linear"):
        problem = f"has a curriculum {' '.join(curriculum.kind)}; only seqlen fixed_linear can be had here"
    elif curriculum.end != job.seq_len:
        problem = f"ends the curriculum at {curriculum.end} tokens, --seq-length is {job.seq_len}; make them agree"
    elif job.arguments.has("--rampup-batch-size"):
        problem = (
            "counts the curriculum in steps, which --rampup-batch-size makes unequal; turn it off, and set model.curriculum "
            "in the result"
        )
    if problem:
        job.arguments.problem("the DeepSpeed configuration", problem)
        return
    of_mean_length = f"{curriculum.steps} steps of the mean length; linear in tokens here, in steps there"
    job.set("model.curriculum.tokens", _curriculum_tokens(job), of_mean_length)
    job.set("model.curriculum.start", curriculum.start)
    job.set("model.curriculum.increment", curriculum.increment)


def _curriculum_tokens(job: Job) -> int:
    curriculum = job.deepspeed.curriculum
    assert curriculum is not None and job.global_batch is not None
    return curriculum.steps * job.global_batch * (curriculum.start + curriculum.end) // 2


def tokens_of_samples(job: Job, samples: int) -> int | None:
    """Tokens of the first sequences, of which a curriculum shortens some; None where length or batch is a problem."""
    if job.seq_len is None:
        return None
    tokens, given = 0, job.deepspeed.curriculum
    if given is not None and job.global_batch is not None:
        try:
            curriculum = SequenceCurriculum(_curriculum_tokens(job), given.start, given.increment)
        except ValueError:  # `translate` reports it
            return samples * job.seq_len
        while samples > 0 and tokens < curriculum.tokens:
            taken = min(samples, job.global_batch)
            tokens += taken * sequence_length(tokens, job.seq_len, curriculum)
            samples -= taken
    return tokens + samples * job.seq_len


def samples_of_steps(job: Job, steps: int) -> int | None:
    """Sequences of the first optimizer steps; None where the batch is a problem."""
    if job.global_batch is None:
        return None
    ramp_up = list(islice(_ramp_up_batches(job), min(steps, sys.maxsize)))
    return sum(ramp_up) + (steps - len(ramp_up)) * job.global_batch


def whole_steps(job: Job, samples: int) -> int | None:
    """Sequences of the whole steps that fit into `samples`; None where the batch is a problem."""
    if job.global_batch is None:
        return None
    trained = 0
    for batch in _ramp_up_batches(job):
        if trained + batch > samples:
            return trained
        trained += batch
    return trained + (samples - trained) // job.global_batch * job.global_batch


def _ramp_up_batches(job: Job) -> Iterator[int]:
    """Sequences of each step of the ramp-up; none without one."""
    ramp_up = _ramp_up(job)
    if ramp_up is None:
        return
    from nlgmoe.data.accumulation import batch_size_after

    assert job.seq_len is not None and job.global_batch is not None
    samples = 0
    while samples * job.seq_len < ramp_up.tokens:
        batch = batch_size_after(samples, job.seq_len, job.global_batch, ramp_up)
        yield batch
        samples += batch


def _ramp_up(job: Job) -> BatchRampUp | None:
    """Return the flag's three numbers; None without it, or with a problem."""
    if not job.arguments.has("--rampup-batch-size") or job.seq_len is None or job.global_batch is None:
        return None
    numbers = job.arguments.value("--rampup-batch-size")
    if numbers is None:
        return None
    if len(numbers) != 3 or min(numbers) < 1:
        job.arguments.refuse("--rampup-batch-size", "takes a start, an increment and a number of sequences; correct it")
        return None
    from nlgmoe.data.accumulation import BatchRampUp

    start, increment, samples = numbers
    if start > job.global_batch:
        job.arguments.refuse("--rampup-batch-size", f"starts above the global batch of {job.global_batch}; lower it")
        return None
    return BatchRampUp(start, increment, samples * job.seq_len)
