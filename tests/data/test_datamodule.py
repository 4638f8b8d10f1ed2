import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlgmoe.data import MegatronIndexed, PileDataModule, PocketPile
from nlgmoe.data.pocket_build import read_texts, text_path, write_corpus
from nlgmoe.validation import SettingError
from tests.support.corpora import Ranks, batches, make_documents, rows, tokens_of
from tests.support.documents import evaluated

Make = Callable[..., PileDataModule]


def test_datamodule_batch_layout(make_data: Make) -> None:
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
    text = data.tokenizer.decode(rows(batch)[0])
    domain = data.domains[int(batch["domain"][0])]
    assert text in "<|endoftext|>".join([*read_texts(text_path(data.data_dir, f"{domain}.train")), ""])


def test_batches_for_an_accelerator_are_pinned(make_data: Make) -> None:
    data = make_data()
    for device, pinned in {"cpu": False, "cuda": True, "xpu": True}.items():
        data.trainer = Ranks(device=device)  # type: ignore[assignment]
        loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
        assert [loader.pin_memory for loader in loaders] == [pinned] * 4


def test_batches_of_a_loader_of_the_users_may_differ_in_size_between_ranks(make_data: Make) -> None:
    """Experts on other ranks would wait for rows that never come."""

    class Own(PileDataModule):
        def train_dataloader(self) -> Any:
            return []

    assert make_data().has_equal_batches() and not Own().has_equal_batches()


@pytest.mark.parametrize("option", ["document_attention", "mask_eod_loss"])
def test_document_masks_are_in_batches_of_training_and_evaluation_on_request(option: str, make_data: Make) -> None:
    data = make_data(**{option: True})
    for batch in (*batches(data, 3), *data.val_dataloader()):
        opens = batch["tokens"] == data.tokenizer.eod_id
        if option == "document_attention":
            assert torch.equal(batch["document"], opens.cumsum(1)) and "loss_mask" not in batch
        else:
            assert torch.equal(batch["loss_mask"], batch["token_mask"] & ~opens) and "document" not in batch


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


def test_datamodule_resumes_with_the_next_sample_whatever_the_batch_size(make_data: Make) -> None:
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


def test_datamodule_refuses_the_state_of_another_run(make_data: Make, tmp_path: Path, tiny_corpus: Path) -> None:
    def of_domains(domains: list[str] | None) -> PileDataModule:
        write_corpus(tmp_path, "tiny", make_documents(20, "prose", 1) + make_documents(9, "verse", 2), {})
        data = PileDataModule(str(tmp_path), str(tiny_corpus / "tokenizer"), PocketPile(domains), seq_len=32)
        data.prepare_data()
        return data

    state = json.loads(json.dumps(make_data().state_dict()))
    with pytest.raises(SettingError, match=r"seq_len \(saved: 32, now: 16\), seed \(saved: 7, now: 8\)\. Set the data"):
        make_data(seed=8, seq_len=16).load_state_dict(state)
    words = r"corpus\.domains \(saved: prose, verse, now: verse\), corpus\.prose \(saved: \w{16}, now: missing\)"
    with pytest.raises(SettingError, match=rf"differ: {words}\."):
        of_domains(["verse"]).load_state_dict(of_domains(None).state_dict())


@pytest.mark.parametrize(("world_size", "max_eval_windows"), [(3, None), (2, 2)])
def test_evaluation_covers_each_byte_once(make_data: Make, world_size: int, max_eval_windows: int | None) -> None:
    data = make_data(max_eval_windows=max_eval_windows, eval_micro_batch_size=5)
    by_rank = [evaluated(data, data.val_dataloader, rank, world_size) for rank in range(world_size)]
    in_order = [window for step in zip(*by_rank, strict=True) for window in step]
    lengths = data.token_byte_lengths()
    for name in data.domains:
        tokens = torch.cat([row for domain, row in in_order if domain == name])
        num_bytes = int(lengths[tokens].sum())
        text = data.tokenizer.decode(tokens[tokens != data.tokenizer.eod_id].tolist())
        whole = "".join(read_texts(text_path(data.data_dir, f"{name}.validation")))
        if max_eval_windows is None:
            assert text == whole and num_bytes == len(whole.encode())
        else:
            complete = text.rstrip("\ufffd")
            assert whole.startswith(complete) and 0 <= num_bytes - len(complete.encode()) < 3
            assert 0 < num_bytes < len(whole.encode())


def test_the_unigram_baseline_is_of_the_tokens_that_have_a_loss(make_data: Make) -> None:
    data = make_data(mask_eod_loss=True)
    counts = np.zeros(data.vocab_size)
    for batch in data.val_dataloader():
        counts += np.bincount(batch["targets"][batch["loss_mask"]], minlength=data.vocab_size)
    train = np.bincount(np.concatenate(tokens_of(data, "train")), minlength=data.vocab_size)
    assert data.token_counts() == train.tolist()
    expected = -(counts * np.log((train + 1) / (train + 1).sum())).sum() / counts.sum()
    assert data.unigram_entropy() == pytest.approx(expected, rel=1e-12)


def test_prepared_shards_are_reused_and_repaired(make_data: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"No corpus in .*: run `nlgmoe prepare-data --data-dir"):
        PileDataModule(str(tmp_path)).setup()
    data = make_data()
    (folder,) = (data.data_dir / "tokenized").iterdir()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.bin")}
    damaged = folder / "verse.bin"
    damaged.write_bytes(b"")
    with pytest.raises(ValueError, match=r"verse\.bin has 0 bytes"):
        PileDataModule(str(data.data_dir), str(data.data_dir / "tokenizer")).setup()
    for hole in (b"", bytes(len(before[damaged][0]))):
        damaged.write_bytes(hole)
        make_data()
        for path, (content, modified) in before.items():
            assert path.read_bytes() == content
            assert path == damaged or path.stat().st_mtime_ns == modified


def test_prepared_data_need_no_write_access(make_data: Make) -> None:
    """A corpus of somebody else, which may be read only."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(make_data().data_dir, Path(name, "corpus"), ignore=shutil.ignore_patterns(".lock")))
        subprocess.run(["chmod", "-R", "a=rX", name], check=True)
        root = os.geteuid() == 0
        os.seteuid(65534 if root else os.geteuid())
        try:
            prefix = next(copy.glob("tokenized/*/verse.bin")).with_suffix("")
            for corpus in (None, MegatronIndexed(str(prefix))):
                data = PileDataModule(str(copy), str(copy / "tokenizer"), corpus, seq_len=32)
                data.prepare_data()
                assert len(batches(data, 1)[0]["tokens"]) == 8
        finally:
            os.seteuid(0 if root else os.geteuid())
            subprocess.run(["chmod", "-R", "u+w", name], check=True)
