"""The corpus of streamed text in training and evaluation: nothing is lost or unusable in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import lightning
import numpy as np
import pytest
import zstandard
from torch import distributed

from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule, PileDataModule
from nlgmoe.cli.errors import describe
from nlgmoe.data import StreamedText
from nlgmoe.data import streamed_files as prepared_files
from nlgmoe.data.streams import Cursors
from nlgmoe.validation import SettingError
from tests.support.corpora import rows, tokens_of
from tests.support.documents import SEQ_LEN, make_texts, write
from tests.support.spawn import spawn
from tests.support.trainers import trainer as quiet_trainer

Open = Callable[..., PileDataModule]


@pytest.fixture
def open_corpus(tiny_corpus: Path, tmp_path: Path) -> Open:
    folder = tmp_path / "pile"
    for i in range(4):
        write(folder / "train" / f"{i:02}.jsonl.zst", make_texts(60, f"file {i}"), domains=3)
    write(folder / "val.jsonl.zst", make_texts(30, "validation"), domains=3)
    write(folder / "test.jsonl.zst", make_texts(20, "test"), domains=3)

    def make(workers: int = 0, **options: Any) -> PileDataModule:
        defaults: dict[str, Any] = {
            "data_files": {"train": "train/*.jsonl.zst", "validation": "val.jsonl.zst", "test": "test.jsonl.zst"},
            "domain_field": "meta.name",
            "domains": ["domain 0", "domain 1"],
            "num_streams": 8,
            "shuffle_buffer": 10,
        }
        data = PileDataModule(
            str(tmp_path / "built"),
            str(tiny_corpus / "tokenizer"),
            StreamedText(**({"path": str(folder)} | defaults | options)),
            micro_batch_size=4,
            seq_len=SEQ_LEN,
            num_workers=workers,
        )
        data.prepare_data()
        data.setup()
        return data

    return make


def make_module(data: PileDataModule) -> MoEGPTModule:
    return MoEGPTModule(GPTConfig(data.vocab_size, SEQ_LEN, 2, 16, 2, moe=MoEConfig(2)))


def fit(data: PileDataModule, steps: int, folder: Path, checkpoint: Path | None = None) -> tuple[Any, Any]:
    """Train a tiny model; return the trainer and the targets that it saw."""
    batches: list[list[int]] = []

    class Seen(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            assert set(batch) == {"tokens", "targets", "token_mask", "domain", "padded", "samples"}
            batches.extend(rows(batch))

    trainer = quiet_trainer(folder, Seen(), max_steps=steps, limit_val_batches=2)
    trainer.fit(make_module(data), data, ckpt_path=checkpoint)
    return trainer, batches


def test_training_on_a_stream_resumes_on_other_workers_after_a_kill(open_corpus: Open, tmp_path: Path) -> None:
    _, straight = fit(open_corpus(), 20, tmp_path)
    trainer, first = fit(open_corpus(workers=2), 9, tmp_path)
    trainer.save_checkpoint(tmp_path / "nine.ckpt")
    saved = json.loads((tmp_path / "nine.ckpt" / "checkpoint.json").read_text())["PileDataModule"]
    assert saved["samples_consumed"] == 36
    assert [cursor[:2] for cursor in saved["cursors"]] == [[stream, 5 - stream // 4] for stream in range(8)]
    data = open_corpus(workers=1)
    _, second = fit(data, 20, tmp_path, tmp_path / "nine.ckpt")
    assert first + second == straight
    trainer = quiet_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(make_module(data), data)
    assert {"val/loss/domain 0", "val/loss/domain 1", "val/loss/other"} <= trainer.callback_metrics.keys()
    with pytest.raises(ValueError, match=r"these differ: corpus.shuffle_buffer \(saved: 10, now: 11\)\."):
        open_corpus(shuffle_buffer=11).load_state_dict(data.state_dict())


def test_stream_of_edited_files_is_evaluated_anew_and_not_resumed(open_corpus: Open, tmp_path: Path) -> None:
    files = {"train": "train/*.jsonl", "validation": "val.jsonl"}
    train, validation = (tmp_path / "pile" / name for name in ("train/a.jsonl", "val.jsonl"))
    states = []
    for name in ("before", "behind"):
        write(train, make_texts(60, name))
        write(validation, make_texts(30, name))
        data = open_corpus(data_files=files)
        assert name in data.tokenizer.decode(np.concatenate(tokens_of(data, "validation"))[:30].tolist())
        states.append((data.state_dict(), train.stat().st_size))
    assert states[0][1] == states[1][1]
    with pytest.raises(ValueError, match=r"differ: corpus\.files \(saved: 1 of \w+, now: 1 of \w+\)"):
        data.load_state_dict(states[0][0])


def test_stream_has_three_splits(open_corpus: Open) -> None:
    files = {"train": "train/*.jsonl.zst", "validation": "val.jsonl.zst", "dev": "test.jsonl.zst"}
    with pytest.raises(ValueError, match=r"data_files\.dev: splits are train, validation, test"):
        open_corpus(data_files=files)


def test_stream_evaluates_the_first_documents_of_each_domain(open_corpus: Open) -> None:
    data = open_corpus(evaluation_tokens=60)
    assert data.domains == ["domain 0", "domain 1", "other"]
    for split, count in (("validation", 30), ("test", 20)):
        for domain, tokens in enumerate(tokens_of(data, split)):
            ends = np.flatnonzero(tokens == data.tokenizer.eod_id)
            texts = [data.tokenizer.decode(document[:-1].tolist()) for document in np.split(tokens, ends + 1)[:-1]]
            assert texts == make_texts(count, split)[domain::3][: len(texts)] and ends[-1] == len(tokens) - 1
            assert ends[-2] + 1 < 60 <= len(tokens)
    documents = [int((tokens == data.tokenizer.eod_id).sum()) for tokens in tokens_of(data, "train")]
    assert documents == [80, 80, 80], "all: evaluation_tokens is of what is evaluated"
    data = open_corpus(domains=["domain 1", "absent"])
    assert [len(tokens) > 0 for tokens in tokens_of(data, "validation")] == [True, False, True]
    assert data.unigram_entropy() > 0 and set(data.xz_bits_per_byte()) == {"domain 1", "other", "all"}


def test_stream_reads_an_object_store_like_a_folder(open_corpus: Open, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for file in (tmp_path / "pile").rglob("*.zst"):
        store.pipe(f"/bucket/{file.relative_to(tmp_path / 'pile')}", file.read_bytes())
    batches = [
        rows(next(iter(open_corpus(path=path, domains=["domain 1"]).train_dataloader())))
        for path in (str(tmp_path / "pile"), f"file://{tmp_path}/pile", "memory://bucket")
    ]
    assert batches[0] == batches[1] == batches[2]
    before = open_corpus(path="memory://bucket").state_dict()
    store.pipe("/bucket/train/00.jsonl.zst", (tmp_path / "pile/train/01.jsonl.zst").read_bytes())
    with pytest.raises(ValueError, match=r"these differ: corpus\.files"):
        open_corpus(path="memory://bucket").load_state_dict(before)


def test_stream_ends_at_bad_data_with_one_line_from_workers_too(
    open_corpus: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_files, "TRAINING_BYTES", 100)  # what is bad is not in the sample
    path = tmp_path / "pile" / "train" / "02.jsonl.zst"
    path.write_bytes(path.read_bytes() + zstandard.ZstdCompressor().compress(b'{"text": 5}\n'))
    for workers in (0, 2):
        data = open_corpus(workers)
        with pytest.raises(ValueError) as error:
            fit(data, 1000, tmp_path)
        (line,) = describe(error.value)
        assert line.startswith(f"{path}, line 61: not text (text is of type int); repair it")


def gather() -> list[list[int]]:
    distributed.init_process_group("gloo")
    cursors, rank = Cursors(), distributed.get_rank()
    cursors.load([[0, 5, 50], [rank + 1, 3 + rank, 30], [9, 7 - rank, rank]])
    return cursors.gather()


def test_stream_state_of_a_rank_has_the_cursors_of_all(tmp_path: Path) -> None:
    expected = [[0, 5, 50], [1, 3, 30], [2, 4, 30], [9, 7, 0]]
    assert spawn(2, gather, folder=tmp_path) == [expected, expected]


def test_stream_errors_name_the_setting(tiny_corpus: Path, tmp_path: Path) -> None:
    tokenizer = str(tiny_corpus / "tokenizer")
    with pytest.raises(SettingError, match="domain_field=a and domains=None belong together"):
        StreamedText("nowhere", domain_field="a")
    write(tmp_path / "train.jsonl", make_texts(3))
    with pytest.raises(SettingError, match=r"\S+train\.jsonl is a file of training and of evaluation, which"):
        StreamedText(str(tmp_path), {"train": "train.jsonl", "validation": "*.jsonl"}).prepare(tmp_path, tokenizer)
    write(tmp_path / "validation.jsonl", make_texts(3))
    corpus = StreamedText(str(tmp_path), num_streams=4)
    corpus.prepare(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="num_streams=4 leaves stream 3 no document;"):
        corpus.open(tmp_path, tokenizer).training_source(SEQ_LEN, 1).sample(3)
