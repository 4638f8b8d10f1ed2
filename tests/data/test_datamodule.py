import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from nlgmoe.data import MegatronIndexed, PileDataModule, PocketPile, TokenArrays
from nlgmoe.data.datamodule import WINDOWS
from nlgmoe.data.pocket.build import read_texts, text_path, write_corpus
from nlgmoe.validation import SettingError
from tests.data.conftest import make_documents, tokens_of

Make = Callable[..., PileDataModule]


class Ranks:
    """Stands for a trainer: all that the data module asks of it."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: str = "cpu") -> None:
        self.global_rank, self.world_size = rank, world_size
        self.strategy = SimpleNamespace(root_device=torch.device(device))


def batches(data: PileDataModule, count: int, rank: int = 0, world_size: int = 1) -> list[dict[str, torch.Tensor]]:
    data.trainer = Ranks(rank, world_size)  # type: ignore[assignment]
    return list(islice(data.train_dataloader(), count))


def rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return batch["targets"].tolist()


def test_batch_layout(make_data: Make) -> None:
    data = make_data()
    (batch,) = batches(data, 1)
    assert batch.pop("padded") is False and batch.pop("samples") == [0, 1, 2, 3]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (4, 32)),
        "targets": (torch.int64, (4, 32)),
        "token_mask": (torch.bool, (4, 32)),
        "domain": (torch.int64, (4,)),
    }
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1]) and batch["token_mask"].all()
    text = data.decode(rows(batch)[0])
    domain = data.domains[int(batch["domain"][0])]
    assert text in "<|endoftext|>".join([*read_texts(text_path(data.data_dir, f"{domain}.train")), ""])


def test_a_batch_says_whether_it_is_padded(make_data: Make) -> None:
    for batch in make_data().val_dataloader():
        assert batch["padded"] is (not bool(batch["token_mask"].all()))


def test_batches_for_an_accelerator_are_pinned(make_data: Make) -> None:
    data = make_data()
    for device, pinned in {"cpu": False, "cuda": True, "xpu": True}.items():
        data.trainer = Ranks(device=device)  # type: ignore[assignment]
        loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
        assert [loader.pin_memory for loader in loaders] == [pinned] * 4


def test_batches_of_another_loader_may_differ_in_size_between_ranks(make_data: Make) -> None:
    class Padded(PileDataModule):
        def train_dataloader(self) -> Any:
            return []

    assert make_data().has_equal_batches() and not Padded().has_equal_batches()


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_divide_the_global_batch(make_data: Make, workers: int) -> None:
    one = batches(make_data(micro_batch_size=12), 60)  # several epochs
    three = [batches(make_data(num_workers=workers), 60, rank, 3) for rank in range(3)]
    for step in range(60):
        assert rows(one[step]) == [row for rank in range(3) for row in rows(three[rank][step])]


def test_workers_leave_signals_to_the_process_that_started_them(make_data: Make) -> None:
    data = make_data(num_workers=1)
    data.trainer = Ranks(0, 1)  # type: ignore[assignment]
    iterator: Any = iter(data.train_dataloader())
    next(iterator)
    (worker,) = iterator._workers
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    assert len(list(islice(iterator, 20))) == 20
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(60)
    assert worker.exitcode == 0


def test_resume_continues_with_the_next_sample_whatever_the_batch_size(make_data: Make) -> None:
    straight = [row for batch in batches(make_data(), 10) for row in rows(batch)]
    data = make_data()
    batches(data, 7)  # loading more than was trained on must not count
    data.advance(8)
    resumed = make_data(micro_batch_size=2)
    resumed.load_state_dict(data.state_dict())
    again = [row for batch in batches(resumed, 8) for row in rows(batch)]
    assert again == straight[8:24]
    loader = resumed.train_dataloader()
    resumed.advance(4)  # a second iteration over one loader goes on too
    assert rows(next(iter(loader))) == straight[12:14]


@pytest.mark.parametrize("option", [{"seed": 8}, {"seq_len": 16}])
def test_state_of_another_run_is_refused(make_data: Make, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"these differ: {next(iter(option))} "):
        make_data(**option).load_state_dict(make_data().state_dict())


def test_a_changed_corpus_says_what_has_changed(make_data: Make, tmp_path: Path, tiny_corpus: Path) -> None:
    def corpus(folder: str, verses: int, seed: int) -> PileDataModule:
        root = tmp_path / folder
        documents = make_documents(20, "prose", 1) + make_documents(verses, "verse", seed)
        write_corpus(root, "tiny", documents, {"made up": "none"})
        data = PileDataModule(str(root), str(tiny_corpus / "tokenizer"), seq_len=32)
        data.prepare_data()
        return data

    state = json.loads(json.dumps(corpus("first", 9, 2).state_dict()))
    corpus("same", 9, 2).load_state_dict(state)
    hashes = r"\(\w{16} there, \w{16} here\)"
    with pytest.raises(ValueError, match=rf"these differ: corpus\.verse {hashes}\."):
        corpus("longer", 12, 2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"these differ: corpus\.domains \(prose, verse there, verse here\)\."):
        PileDataModule(
            str(tmp_path / "first"), str(tiny_corpus / "tokenizer"), PocketPile(["verse"]), seq_len=32
        ).load_state_dict(state)


def test_other_validation_text_is_warned_of_when_a_run_goes_on(
    make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = json.loads(json.dumps(make_data(max_eval_windows=2).state_dict()))

    def resume(fn: TrainerFn = TrainerFn.FITTING, **options: Any) -> None:
        data = make_data(**options)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            state=SimpleNamespace(fn=fn), limit_val_batches=1.0, global_rank=0, world_size=1
        )
        data.load_state_dict(state)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(max_eval_windows=2)
        resume(TrainerFn.VALIDATING, max_eval_windows=3)
    with pytest.warns(
        UserWarning, match=r"these differ: validation text \(.* validated sequences, by data.max_eval_windows"
    ):
        resume(max_eval_windows=3)
    with pytest.warns(
        UserWarning, match=r"these differ: data.mask_eod_loss \(False there, True here\)\. val/loss and the best"
    ):
        resume(max_eval_windows=2, mask_eod_loss=True)
    tokens = TokenArrays.evaluation_tokens
    monkeypatch.setattr(
        TokenArrays, "evaluation_tokens", lambda self, split: [t[::-1] for t in tokens(self, split) or []]
    )
    with pytest.warns(UserWarning, match=r"these differ: validation text \(\w+ there, \w+ here\)\. val"):
        resume(max_eval_windows=2)


def test_another_part_of_the_validation_text_is_warned_of_when_a_run_goes_on(make_data: Make) -> None:
    def data(ranks: int, limit: int | float, **options: Any) -> PileDataModule:
        made = make_data(micro_batch_size=2, max_eval_windows=4, **options)
        made.trainer = SimpleNamespace(  # type: ignore[assignment]
            state=SimpleNamespace(fn=TrainerFn.FITTING), limit_val_batches=limit, global_rank=0, world_size=ranks
        )
        return made

    whole = data(1, 1.0)
    alone = make_data(micro_batch_size=2, max_eval_windows=4)
    windows, state = sum(len(batch["tokens"]) for batch in alone.val_dataloader()), data(1, 2).state_dict()
    assert (whole.state_dict()["evaluation"][WINDOWS], state["evaluation"][WINDOWS]) == (windows, 4)
    assert data(2, 0.5).state_dict()["evaluation"][WINDOWS] == int(-(-windows // 4) * 0.5) * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data(2, 1).load_state_dict(state)
        data(1, 0).load_state_dict(state)  # validates nothing
        data(1, 1, eval_micro_batch_size=4).load_state_dict(state)
        data(2, 1.0).load_state_dict(whole.state_dict())
    with pytest.warns(
        UserWarning, match=r"these differ: validated sequences, by .*trainer.limit_val_batches \(4 there, 8 here\)"
    ):
        data(2, 2).load_state_dict(state)


def test_a_run_whose_samples_came_in_another_order_is_refused(make_data: Make) -> None:
    state = make_data().state_dict()
    del state["fingerprint"]["order"]
    with pytest.raises(
        SettingError, match=r"order \(missing there, feistel-8 here\)\. Set the data options as in that run"
    ):
        make_data().load_state_dict(state)


@pytest.mark.parametrize(("world_size", "max_eval_windows"), [(1, None), (3, None), (2, 2)])
def test_evaluation_covers_each_byte_once(make_data: Make, world_size: int, max_eval_windows: int | None) -> None:
    data = make_data(max_eval_windows=max_eval_windows, eval_micro_batch_size=5)
    targets: list[list[tuple[int, list[int]]]] = []
    counts = []
    for rank in range(world_size):
        data.trainer = Ranks(rank, world_size)  # type: ignore[assignment]
        loaded = list(data.val_dataloader())
        counts.append(len(loaded))
        targets.append(
            [
                (int(domain), row[mask].tolist())
                for batch in loaded
                for domain, row, mask in zip(batch["domain"], batch["targets"], batch["token_mask"], strict=True)
            ]
        )
    assert len(set(counts)) == 1 and len({len(rank) for rank in targets}) == 1
    in_order = [window for step in zip(*targets, strict=True) for window in step]
    lengths = data.token_byte_lengths()
    for domain, name in enumerate(data.domains):
        num_bytes = sum(int(lengths[row].sum()) for d, row in in_order if d == domain)
        text = data.decode([token for d, row in in_order if d == domain for token in row if token != data.eod_id])
        whole = "".join(read_texts(text_path(data.data_dir, f"{name}.validation")))
        if max_eval_windows is None:
            assert text == whole and num_bytes == len(whole.encode())
        else:
            assert whole.startswith(text.rstrip("\ufffd")) and 0 <= num_bytes - len(text.rstrip("\ufffd").encode()) < 3
            assert 0 < num_bytes < len(whole.encode())


def test_unigram_entropy_is_that_of_the_smoothed_counts(make_data: Make) -> None:
    data = make_data()
    ids = {split: np.concatenate(tokens_of(data, split)) for split in ("train", "validation")}
    counts = np.bincount(ids["train"], minlength=data.vocab_size) + 1.0
    expected = -np.mean(np.log(counts / counts.sum())[ids["validation"]])
    assert data.unigram_entropy() == pytest.approx(expected, rel=1e-12)
    assert data.token_counts() == (counts - 1).tolist()
    assert 0 < data.unigram_entropy() < math.log(data.vocab_size)
    assert set(data.xz_bits_per_byte()) == {*data.domains, "all"}


def test_a_baseline_is_of_the_tokens_that_have_a_loss(make_data: Make) -> None:
    data = make_data(mask_eod_loss=True)
    counts = torch.zeros(data.vocab_size)
    for batch in data.val_dataloader():
        counted = batch["loss_mask"] & batch["token_mask"]
        counts += batch["targets"][counted].bincount(minlength=data.vocab_size)
    train = torch.tensor(data.token_counts()) + 1
    expected = -(counts * (train / train.sum()).log()).sum() / counts.sum()
    assert data.unigram_entropy() == pytest.approx(float(expected), rel=1e-6)
    assert data.unigram_entropy() != pytest.approx(make_data().unigram_entropy(), rel=1e-6)


def test_shards_are_reused_and_repaired(make_data: Make) -> None:
    data = make_data()
    (folder,) = (data.data_dir / "tokenized").iterdir()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.bin")}
    damaged = folder / "verse.train.bin"
    damaged.write_bytes(b"")
    with pytest.raises(ValueError, match=r"verse\.train\.bin has 0 bytes"):
        PileDataModule(str(data.data_dir), str(data.data_dir / "tokenizer")).setup()
    for hole in (b"", bytes(len(before[damaged][0]))):
        damaged.write_bytes(hole)
        make_data()
        for path, (content, modified) in before.items():
            assert path.read_bytes() == content
            assert path == damaged or path.stat().st_mtime_ns == modified


@pytest.fixture
def as_somebody_else(make_data: Make) -> Iterator[Path]:
    """A copy of the corpus that may be read, but not written to."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(make_data().data_dir, Path(name, "corpus"), ignore=shutil.ignore_patterns(".lock")))
        subprocess.run(["chmod", "-R", "a=rX", name], check=True)
        root = os.geteuid() == 0
        os.seteuid(65534 if root else os.geteuid())
        try:
            yield copy
        finally:
            os.seteuid(0 if root else os.geteuid())
            subprocess.run(["chmod", "-R", "u+w", name], check=True)


def test_what_is_prepared_needs_no_write_access(as_somebody_else: Path) -> None:
    arguments = (str(as_somebody_else), str(as_somebody_else / "tokenizer"))
    prefix = next(as_somebody_else.glob("tokenized/*/verse.train.bin")).with_suffix("")
    for corpus in (None, MegatronIndexed(str(prefix), (3, 1, 0))):
        data = PileDataModule(*arguments, corpus, seq_len=32)
        data.prepare_data()
        data.setup()
        assert len(batches(data, 1)[0]["tokens"]) == 8
    with pytest.raises(PermissionError, match="tokenizers"):  # there is something to build
        PileDataModule(str(as_somebody_else), "pocket-4k").prepare_data()


def test_user_errors_name_the_setting(tmp_path: Path, make_data: Make) -> None:
    with pytest.raises(ValueError, match="seq_len=0 must be at least 1"):
        PileDataModule(seq_len=0)
    with pytest.raises(ValueError, match="nlgmoe prepare-data"):
        PileDataModule(str(tmp_path)).setup()
    with pytest.raises(ValueError, match="lower `seq_len`"):
        make_data(seq_len=10**6).train_dataloader()


class Recorder(lightning.LightningModule):
    """Records what Lightning hands to a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen += rows(batch)
        return self.weight.sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.trainer.datamodule.advance(len(batch["tokens"]))  # type: ignore[attr-defined]

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.validated += [row[mask].tolist() for row, mask in zip(batch["targets"], batch["token_mask"], strict=True)]

    def predict_step(self, batch: dict[str, torch.Tensor], index: int) -> int:
        return int(batch["token_mask"].sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, **options: Any) -> lightning.Trainer:
    options |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **options)


def test_under_lightning(make_data: Make, tmp_path: Path) -> None:
    """The count is in the checkpoint, and a resumed fit sees the samples that an uninterrupted one would have."""
    data, straight = make_data(), Recorder()
    make_trainer(tmp_path, max_steps=6, enable_checkpointing=False, limit_val_batches=0).fit(straight, datamodule=data)
    data, first = make_data(num_workers=1), Recorder()
    trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=0)
    trainer.fit(first, datamodule=data)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    data, second = make_data(), Recorder()
    trainer = make_trainer(tmp_path, max_steps=6, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(second, datamodule=data, ckpt_path=tmp_path / "four.ckpt")
    assert data.samples_consumed == 24
    assert first.seen + second.seen == straight.seen

    trainer = make_trainer(tmp_path)
    trainer.validate(second, datamodule=data)
    validated = [token for row in second.validated for token in row]
    assert validated == np.concatenate(tokens_of(data, "validation")).tolist()
    predicted: Any = trainer.predict(second, datamodule=data)
    assert sum(predicted) == len(validated)
