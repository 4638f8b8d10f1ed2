"""Sample indices of a rank.

Both samplers derive from `DistributedSampler`, so that Lightning does not wrap them in one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from nlgmoe.data.sources import Sample, TokenSource
from nlgmoe.validation import RunError


class SourceDataset(Dataset[Sample]):
    """A map-style dataset over a source. It has no length: the sampler determines the number of samples.

    Every sample is checked against the vocabulary: with other ids the embedding would crash or read invalid memory.

    Args:
        source: of the samples.
        vocab_size: ids must be below it.
        domains: names, for messages.
        mark: adds derived entries to a sample.
    """

    def __init__(
        self, source: TokenSource, vocab_size: int, domains: Sequence[str], mark: Callable[[Sample], Sample]
    ) -> None:
        self._source = source
        self._vocab_size = vocab_size
        self._domains = domains
        self._mark = mark

    def __getitem__(self, index: int) -> Sample:
        sample = self._source.sample(index)
        for part in (sample["tokens"], sample["targets"]):
            lowest, highest = map(int, torch.aminmax(part))
            if lowest < 0 or highest >= self._vocab_size:
                raise RunError(
                    f"Sample {index} of {self._domains[int(sample['domain'])]} holds token ids from {lowest} to {highest}, but "
                    f"the tokenizer has {self._vocab_size}: the corpus is damaged there, or made with another tokenizer. "
                    "Build it again, or set data.tokenizer."
                )
        return self._mark(sample)


class MicroBatches(Dataset[Any]):
    """Micro-batches by the indices of their samples, which they have as `samples`.

    Args:
        samples: single samples.
        collate: makes a batch of several.
    """

    def __init__(self, samples: SourceDataset, collate: Callable[[list[Sample]], Any]) -> None:
        self._samples = samples
        self._collate = collate

    def __getitem__(self, indices: list[int]) -> Any:
        return self._collate([self._samples[index] for index in indices]) | {"samples": indices}


class TrainingSampler(DistributedSampler):
    """Endless micro-batches of one rank, as lists of sample indices, beginning at the samples consumed so far.

    A step takes consecutive samples, each of its micro-batches the next ones; rank r owns the r-th slice of a micro-batch.
    The size of a step is a function of the samples before it, so ranks, workers and restarts do not change its samples.

    Args:
        samples_consumed: called when an iteration begins, so that a second one continues.
        batch_size_after: sequences of the step that follows so many samples, over all ranks.
        micro_batches: A, of a step.
        rank: of this process, 0 <= rank < world_size.
        world_size: W, number of data-parallel processes; `A * W` divides every step.
    """

    def __init__(
        self,
        samples_consumed: Callable[[], int],
        batch_size_after: Callable[[int], int],
        micro_batches: int,
        rank: int,
        world_size: int,
    ) -> None:
        # The base class needs a dataset with a length, which endless data lack: its __init__ is not called.
        self._samples_consumed = samples_consumed
        self._batch_size_after = batch_size_after
        self._micro_batches = micro_batches
        self.rank = rank
        self.num_replicas = world_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self._samples_consumed()
        while True:
            size, rest = divmod(self._batch_size_after(start), self._micro_batches * self.num_replicas)
            assert rest == 0, "the data module checks what divides"
            for _ in range(self._micro_batches):
                first = start + self.rank * size
                yield list(range(first, first + size))
                start += self.num_replicas * size

    def __len__(self) -> int:
        raise TypeError("endless")  # what `len` of something without a length raises

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order depends on the sample index alone."""


class EvaluationSampler(DistributedSampler):
    """Every `world_size`-th index of a finite source, with -1 (padding) at the end so that all ranks have equally many.

    Args:
        length: of the source, in samples.
        rank: of this process, 0 <= rank < world_size.
        world_size: number of data-parallel processes.
    """

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self._length = length
        self.rank = rank
        self.num_replicas = world_size

    def __iter__(self) -> Iterator[int]:
        for first in range(0, self._length, self.num_replicas):
            index = first + self.rank
            yield index if index < self._length else -1

    def __len__(self) -> int:
        return -(-self._length // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: evaluation has one order."""
