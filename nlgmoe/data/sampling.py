"""The batches of a run: sizes of steps, the samples of a rank, their document masks, and the processes that load them.

Both samplers derive from `DistributedSampler`, so that no Trainer wraps them in one, whatever its `use_distributed_sampler` is.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset, DistributedSampler, default_collate

from nlgmoe.batch import Batch
from nlgmoe.data.samples import Sample, TokenSource
from nlgmoe.data.tokens import check_ids
from nlgmoe.validation import SettingError, require, require_at_least


@dataclass(eq=False)
class SourceDataset(Dataset[Sample]):
    """A map-style dataset over a source. It has no length: the sampler determines the number of samples."""

    source: TokenSource
    vocab_size: int  # every sample is checked against it
    domains: Sequence[str]
    mark: Callable[[Sample], Sample]  # adds derived entries to a sample

    def __getitem__(self, index: int) -> Sample:
        sample = self.source.sample(index)
        for part in (sample["tokens"], sample["targets"]):
            check_ids(part.numpy(), self.vocab_size, f"Sample {index} of {self.domains[int(sample['domain'])]}")
        return self.mark(sample)


@dataclass(eq=False)
class MicroBatches(Dataset[Batch]):
    """Micro-batches by the indices of their samples, which they have as `samples`."""

    dataset: SourceDataset

    def __getitem__(self, indices: list[int]) -> Batch:
        return {**collate([self.dataset[index] for index in indices]), "samples": indices}


@dataclass(eq=False)
class TrainingSampler(DistributedSampler):
    """Endless micro-batches of one rank, as lists of sample indices, beginning at the samples consumed so far.

    A step takes consecutive samples, and so do its micro-batches; rank r owns the r-th slice of a micro-batch.
    The size of a step is a function of the samples before it, so ranks, workers and restarts do not change its samples.
    """

    # The base class needs a dataset with a length, which endless data lack: its __init__ is not called.
    samples_consumed: Callable[[], int]  # called when an iteration begins, so that a second one continues
    batch_size_after: Callable[[int], int]  # samples consumed -> sequences of the next step, over all ranks
    micro_batches: int  # A, of a step
    rank: int
    num_replicas: int  # W, data-parallel processes; `A * W` divides every step

    def __iter__(self) -> Iterator[list[int]]:
        start = self.samples_consumed()
        while True:
            size, rest = divmod(self.batch_size_after(start), self.micro_batches * self.num_replicas)
            assert rest == 0, "the data module checks divisibility"
            for _ in range(self.micro_batches):
                first = start + self.rank * size
                yield list(range(first, first + size))
                start += self.num_replicas * size

    def __len__(self) -> int:
        raise TypeError("endless")  # what `len` of something without a length raises


@dataclass(eq=False)
class EvaluationSampler(DistributedSampler):
    """Every `num_replicas`-th index of a finite source, with -1 (padding) at the end so that all ranks have equally many."""

    length: int  # of the source
    rank: int
    num_replicas: int

    def __iter__(self) -> Iterator[int]:
        for first in range(0, self.length, self.num_replicas):
            index = first + self.rank
            yield index if index < self.length else -1

    def __len__(self) -> int:
        return -(-self.length // self.num_replicas)


def mark_documents(sample: Sample, eod_id: int, attention: bool, mask_loss: bool) -> Sample:
    """Mark the beginnings of documents for attention, the loss, both or neither.

    An end-of-document token in the input begins a document: its target is that document's first token.

        tokens      c  EOD  a  b  EOD  a      (a window that begins inside a document)
        targets    EOD  a   b EOD  a   b
        document    0   1   1  1   2   2
        loss_mask   1   0   1  1   0   1

    Args:
        sample: not changed.
        eod_id: the end-of-document token.
        attention: add `document`, the number of the document that each position belongs to.
        mask_loss: add `loss_mask`, which leaves out padding and the first token of every document, which
            cannot be predicted from the tokens before it.
    """
    borders = sample["tokens"] == eod_id
    marked = sample.copy()
    if attention:
        marked["document"] = borders.cumsum(0)
    if mask_loss:
        marked["loss_mask"] = sample["token_mask"] & ~borders
    return marked


def collate(samples: list[Sample]) -> Batch:
    """Collate samples into a batch."""
    batch: Batch = default_collate(samples)
    return {**batch, "padded": not bool(batch["token_mask"].all())}


def ignore_worker_signals(worker: int) -> None:
    """Leave signals to the training process, which saves before it ends (`run/save_checkpoints.py`).

    Ctrl+C, SIGUSR1 and SIGUSR2 are ignored, and SIGTERM unless it comes from the process that started this one.

    Terminals, Slurm and DeepSpeed's launcher send signals to every process, and training needs batches to reach its next
    step. For `DataLoader(worker_init_fn=...)`.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Blocked, and read one by one by a thread: a handler does not get the sender of a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@dataclass(frozen=True)
class BatchRampUp:
    """Small batches first: the global batch grows in equal steps up to `global_batch_size` (`--rampup-batch-size`).

    A step keeps its number of micro-batches, which are smaller at first: `start` and `increment` are multiples of
    `global_batch_size / micro_batch_size`.

    Attributes:
        start: sequences of the first optimizer steps, over all ranks.
        increment: sequences by which the batch grows each time.
        tokens: the batch reaches `global_batch_size` after this many tokens, counted as sequences times `seq_len`.
    """

    start: int
    increment: int
    tokens: int

    def __post_init__(self) -> None:
        require_at_least(1, self, "start", "increment", "tokens")


def batch_size_after(samples: int, seq_len: int, global_batch_size: int, ramp_up: BatchRampUp | None) -> int:
    """Return the sequences of the optimizer step that follows the first `samples` sequences, over all ranks."""
    if ramp_up is None or samples * seq_len >= ramp_up.tokens:
        return global_batch_size
    increments = (global_batch_size - ramp_up.start) // ramp_up.increment
    return ramp_up.start + ramp_up.increment * (samples * seq_len * increments // ramp_up.tokens)


def check_ramp_up(ramp_up: BatchRampUp, global_batch_size: int | None, micro_batch_size: int) -> None:
    """Check that every batch of the ramp-up can be made, on any number of ranks."""
    if global_batch_size is None:
        raise SettingError("global_batch_size=null: batch_ramp_up has no batch to grow to; set it")
    if global_batch_size % micro_batch_size:
        return  # `micro_batches_per_step` reports that
    growth, unit = global_batch_size - ramp_up.start, global_batch_size // micro_batch_size
    fits = growth >= 0 and growth % ramp_up.increment == 0
    fits = fits and ramp_up.start % unit == 0 and ramp_up.increment % unit == 0
    problem = f"start={ramp_up.start} does not grow to global_batch_size={global_batch_size} by increment="
    remedy = f"make start and increment multiples of {unit}, and global_batch_size - start one of increment"
    require(fits, f"{problem}{ramp_up.increment}; {remedy}")


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the micro-batches of each of the data-parallel ranks in an optimizer step (`--global-batch-size` of Megatron)."""
    per_round = micro_batch_size * world_size
    count, rest = divmod(global_batch_size, per_round)
    if rest == 0:
        return count
    ranks = "1 rank feeds" if world_size == 1 else f"{world_size} ranks feed"
    unit = f"the {per_round} sequences that {ranks} at a time with data.micro_batch_size={micro_batch_size}"
    problem = f"data.global_batch_size={global_batch_size} is not a multiple of {unit}"
    raise SettingError(f"{problem}; change one of them")
