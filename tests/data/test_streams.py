"""Streams: every document once an epoch, and exact and quick resumption."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlgmoe.data import streams as streams_module
from nlgmoe.data.documents import Fields
from nlgmoe.data.samples import Sample
from nlgmoe.data.sampling import TrainingSampler
from nlgmoe.data.streams import Cursor, Cursors, Stream, StreamConfig, StreamedSource, Window
from nlgmoe.data.tokenizer import Tokenizer
from tests.support.documents import SEQ_LEN, lines, make_texts, write

Config = Callable[..., StreamConfig]


@pytest.fixture(scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Config:
    folder = tmp_path_factory.mktemp("files")

    def make(files: int, streams: int, buffer: int = 5, per_file: int = 40) -> StreamConfig:
        endings = ("jsonl", "jsonl.zst", "parquet")
        names = [folder / f"{i}.{per_file}.{endings[i % 3]}" for i in range(files)]
        for i, name in enumerate(names):
            if not name.exists():
                write(name, make_texts(per_file, f"file {i}"))
        return StreamConfig([str(name) for name in names], Fields(), ["text"], tokenizer, streams, buffer)

    return make


def documents_of(windows: Iterator[Window], tokenizer: Tokenizer, epochs: int) -> Iterator[str]:
    """Texts in the order in which they are trained on, until those of so many epochs have gone by; checks the packing."""
    previous, document = tokenizer.eod_id, []
    for number, window in enumerate(windows):
        assert window.inputs.tolist() == [previous, *window.targets[:-1].tolist()] and window.after.window == number + 1
        for token in window.targets.tolist():
            if token == tokenizer.eod_id:
                yield tokenizer.decode(document)
                document = []
            else:
                document.append(token)
        previous = int(window.targets[-1])
        if window.after.epoch == epochs:
            return


@pytest.mark.parametrize(("files", "streams"), [(1, 3), (6, 4), (7, 1)])
def test_streams_have_together_the_corpus_in_an_epoch(
    make_config: Config, tokenizer: Tokenizer, files: int, streams: int
) -> None:
    config = make_config(files, streams)
    first: list[str] = []
    for stream in range(streams):
        found = list(documents_of(Stream(config, stream, SEQ_LEN, 1).windows(Cursor()), tokenizer, 2))
        length = next(i for i, text in enumerate(found) if text in found[:i])
        assert sorted(found[:length]) == sorted(found[length : 2 * length])  # the second epoch: the same ...
        assert found[:length] != found[length : 2 * length]  # ... in another order
        first += found[:length]
        assert abs(length - files * 40 / streams) <= files  # nobody is through much before the others
    assert sorted(first) == sorted(text for i in range(files) for text in make_texts(40, f"file {i}"))


def test_streams_shuffle_documents_in_blocks_and_files_anew_every_epoch(
    make_config: Config, tokenizer: Tokenizer
) -> None:
    def order(seed: int, buffer: int) -> list[str]:
        stream = Stream(make_config(1, 1, buffer), 0, SEQ_LEN, seed)
        return list(islice(documents_of(stream.windows(Cursor()), tokenizer, 1), 40))

    texts = make_texts(40, "file 0")
    assert order(1, 1) == texts and order(1, 5) == order(1, 5) and order(1, 5) != order(2, 5) != order(2, 40)
    blocks = [sorted(texts[i : i + 5]) for i in range(0, 40, 5)]
    assert [sorted(order(1, 5)[i : i + 5]) for i in range(0, 40, 5)] == blocks
    windows = Stream(make_config(6, 1), 0, SEQ_LEN, 1).windows(Cursor())
    files = [text.split(":")[0].split()[1] for text in documents_of(windows, tokenizer, 2)]
    first, second = list(dict.fromkeys(files)), list(dict.fromkeys(files[240:]))
    assert sorted(first) == sorted(second) == list("012345") and list("012345") != first != second


class Run:
    """Ranks with workers that load ahead, in one process: who reads what, what is trained on, what a checkpoint has."""

    def __init__(self, config: StreamConfig, shape: tuple[int, int, int], state: tuple[int, list[list[int]]]) -> None:
        self.ranks, self.workers, self.size = shape
        self.consumed, cursors = state
        self.sources = [[StreamedSource(config, SEQ_LEN, 3) for _ in range(self.workers)] for _ in range(self.ranks)]
        for source in (source for rank in self.sources for source in rank):
            source.seek(cursors)
        self.cursors = [Cursors() for _ in range(self.ranks)]
        for rank in self.cursors:
            rank.load(cursors)
        self.samplers = [
            iter(TrainingSampler(lambda: self.consumed, lambda _: self.size * self.ranks, 1, rank, self.ranks))
            for rank in range(self.ranks)
        ]
        self.loaded: list[deque[list[Any]]] = [deque() for _ in range(self.ranks)]
        self.turn = [0] * self.ranks

    def train(self, steps: int, ahead: int) -> list[list[int]]:
        """Inputs and targets of the samples in their order. At the end, every rank is in the middle of a step."""
        trained = []
        for _ in range(steps):
            for rank, loaded in enumerate(self.loaded):
                while len(loaded) <= ahead:
                    source = self.sources[rank][self.turn[rank] % self.workers]
                    loaded.append([source.sample(i) for i in next(self.samplers[rank])])
                    self.turn[rank] += 1
                trained += self.take(rank)
                self.cursors[rank].commit(self.size)
            self.consumed += self.ranks * self.size
        for rank in range(self.ranks if ahead > 0 else 0):
            self.take(rank)
        return trained

    def take(self, rank: int) -> list[list[int]]:
        batch = self.loaded[rank].popleft()
        self.cursors[rank].take({"cursor": torch.stack([sample["cursor"] for sample in batch])})
        return [seen(sample) for sample in batch]

    def state(self) -> tuple[int, list[list[int]]]:
        everything = Cursors()
        for rank in self.cursors:
            everything.load([*everything.latest(), *rank.latest()])
        return json.loads(json.dumps((self.consumed, everything.latest())))


def seen(sample: Sample) -> list[int]:
    return [*sample["tokens"].tolist(), *sample["targets"].tolist()]


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(
    files=st.integers(1, 4),
    streams=st.integers(1, 8),
    buffer=st.integers(1, 9),
    lives=st.lists(st.tuples(SHAPES, st.integers(1, 9), st.integers(0, 4)), min_size=2, max_size=4),
)
def test_stream_killed_anywhere_resumes_on_other_ranks_and_workers(
    make_config: Config, files: int, streams: int, buffer: int, lives: list[Any]
) -> None:
    config = make_config(files, streams, buffer, per_file=12)
    state: tuple[int, list[list[int]]] = (0, [])
    trained: list[list[int]] = []
    for shape, steps, ahead in lives:
        run = Run(config, shape, state)
        trained += run.train(steps, ahead)
        state = run.state()
    undisturbed = StreamedSource(config, SEQ_LEN, 3)
    assert trained == [seen(undisturbed.sample(i)) for i in range(len(trained))]
    # The cursors are those of the samples that were trained on, each of them just behind its stream's last one.
    expected = {stream: -(-(len(trained) - stream) // streams) for stream in range(min(streams, len(trained)))}
    assert {stream: window for stream, window, *_ in state[1]} == expected


def test_stream_reads_a_block_to_resume(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config, read, documents = make_config(1, 1, 10, 500), list[Any](), streams_module.read_documents

    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        for each in documents(*args, **options):
            read.append(each)
            yield each

    monkeypatch.setattr(streams_module, "read_documents", counted)
    fresh, resumed, late = StreamedSource(config, SEQ_LEN, 3), StreamedSource(config, SEQ_LEN, 3), 600
    cursor, wanted = fresh.sample(late - 1)["cursor"].tolist(), fresh.sample(late)["targets"].tolist()
    before = len(read)
    resumed.seek([cursor])
    assert resumed.sample(late)["targets"].tolist() == wanted
    assert len(read) - before <= 20 < before  # two blocks, if the window reaches into the next


def test_stream_leaves_out_documents_without_text_when_resumed_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Two streams share a file of 18 documents, six of them without text."""
    texts, seen = make_texts(12), list[str]()
    (path := tmp_path / "a.jsonl").write_bytes(lines(["", *texts[:5], " ", "\n", *texts[5:], "\t", ""]) + b"\n")
    config = StreamConfig([str(path)], Fields(), ["text"], tokenizer, 2, 4)
    for number in range(2):
        stream = Stream(config, number, SEQ_LEN, 1)
        windows = list(islice(stream.windows(Cursor()), 60))
        assert windows[-1].after.epoch >= 2
        for first in range(0, 50, 7):
            again = list(islice(stream.windows(windows[first].after), 5))
            assert [window.after for window in again] == [window.after for window in windows[first + 1 : first + 6]]
        seen += documents_of(stream.windows(Cursor()), tokenizer, 1)
    assert set(seen) == set(texts)
