"""Which sample indices a rank reads.

Both samplers derive from `DistributedSampler`, which marks them as already divided between ranks: Lightning then
leaves them alone, whatever `use_distributed_sampler` says.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Dataset, DistributedSampler

from nlgmoe.data.sources import Sample, TokenSource


class SourceDataset(Dataset[Sample]):
    """A map-style dataset over a source. It has no length: how far to go is the sampler's business.

    Every sample is held against the vocabulary: an id beyond it is a crash in the embedding or, worse, none.

    Args:
        source: of the samples.
        vocab_size: ids must be below it.
        domains: names, for messages.
    """

    def __init__(self, source: TokenSource, vocab_size: int, domains: Sequence[str]) -> None:
        self._source = source
        self._vocab_size = vocab_size
        self._domains = domains

    def __getitem__(self, index: int) -> Sample:
        sample = self._source.sample(index)
        for part in (sample["tokens"], sample["targets"]):
            lowest, highest = map(int, torch.aminmax(part))
            if lowest < 0 or highest >= self._vocab_size:
                raise ValueError(
                    f"Sample {index} of {self._domains[int(sample['domain'])]} holds token ids from {lowest} to {highest}, but "
                    f"the tokenizer has {self._vocab_size}: the corpus is damaged there, or made with another tokenizer. "
                    "Build it again, or set data.tokenizer."
                )
        return sample


class TrainingSampler(DistributedSampler):
    """Endless sample indices of one rank, beginning at the samples consumed so far.

    A global micro-batch is `world_size * micro_batch_size` consecutive samples; rank r owns the r-th slice of
    `micro_batch_size`. Batches of `micro_batch_size` indices from here are therefore that rank's micro-batches.

    Args:
        samples_consumed: asked whenever an iteration begins, so that a second one goes on where training stands.
        micro_batch_size: B, sequences per rank.
        rank: of this process, 0 <= rank < world_size.
        world_size: W, number of data-parallel processes.
    """

    def __init__(self, samples_consumed: Callable[[], int], micro_batch_size: int, rank: int, world_size: int) -> None:
        # The base class wants a dataset with a length, which endless data does not have: its __init__ is not called.
        self._samples_consumed = samples_consumed
        self._micro_batch_size = micro_batch_size
        self.rank = rank
        self.num_replicas = world_size

    def __iter__(self) -> Iterator[int]:
        start = self._samples_consumed()
        while True:
            first = start + self.rank * self._micro_batch_size
            yield from range(first, first + self._micro_batch_size)
            start += self.num_replicas * self._micro_batch_size

    def __len__(self) -> int:
        raise TypeError("endless")  # what `len` of something without a length raises

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the order depends on the sample index alone."""


class EvaluationSampler(DistributedSampler):
    """Every `world_size`-th index of a finite source, filled up with -1 (padding) so that all ranks have equally many.

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
        """Nothing: evaluation has one order."""
