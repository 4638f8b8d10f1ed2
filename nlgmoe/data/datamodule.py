"""`PileDataModule`: text in, batches out. Its whole state is the number of samples that were trained on."""

import hashlib
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from nlgmoe.data.pocket_pile import SPLITS, Manifest, read_manifest
from nlgmoe.data.prepare import prepare
from nlgmoe.data.sampling import EvaluationSampler, SourceDataset, TrainingSampler
from nlgmoe.data.shards import open_shard, read_shards
from nlgmoe.data.sources import EvaluationSource, PackedSource, Sample
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer


class PileDataModule(LightningDataModule):
    """The pocket Pile as batches of packed sequences.

    A batch is a dict: `tokens` and `targets` int64 [B, T], `token_mask` bool [B, T] (False = padding), `domain`
    int64 [B]. Training batches go on without end; set `max_steps` or a token budget on the trainer.

    Args:
        data_dir: folder of the corpus, its tokenizers and its tokenised shards; built there if missing.
        tokenizer: "gpt2", "pocket-8k", "pocket-4k", or a folder with tokenizer.json or vocab.json and merges.txt.
        micro_batch_size: sequences per rank and forward pass in training.
        eval_micro_batch_size: sequences per rank and forward pass in evaluation; None: as in training.
        seq_len: tokens per sequence.
        seed: of the order in which training sequences come.
        num_workers: processes that load batches, per rank; 0 loads in the training process.
        max_eval_windows: sequences evaluated per domain, the first ones; None: all.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        data_dir: str = "data/pocket_pile",
        tokenizer: str = "pocket-8k",
        micro_batch_size: int = 8,
        eval_micro_batch_size: int | None = None,
        seq_len: int = 256,
        seed: int = 1234,
        num_workers: int = 0,
        max_eval_windows: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "micro_batch_size": micro_batch_size,
            "eval_micro_batch_size": eval_micro_batch_size,
            "seq_len": seq_len,
            "max_eval_windows": max_eval_windows,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        self.data_dir = Path(data_dir)
        self.micro_batch_size = micro_batch_size
        self.eval_micro_batch_size = eval_micro_batch_size or micro_batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.num_workers = num_workers
        self.max_eval_windows = max_eval_windows
        self.samples_consumed = 0
        self._tokenizer_name = tokenizer
        self._tokenizer: Tokenizer | None = None
        self._manifest: Manifest | None = None
        self._streams: dict[str, list[np.ndarray]] = {}

    # ---- building and opening

    def prepare_data(self) -> None:
        """Build what is missing of corpus, tokenizer and shards (one process a node)."""
        prepare(self.data_dir, self._tokenizer_name)

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenizer and memory-map the shards.

        Raises:
            ValueError: `prepare_data` has not run for this tokenizer and text.
        """
        if self._streams:
            return
        manifest = read_manifest(self.data_dir)
        if manifest is None:
            raise ValueError(
                f"No corpus in {self.data_dir}: run `nlgmoe prepare-data --data_dir {self.data_dir}` first."
            )
        tokenizer = load_tokenizer(self._tokenizer_name, self.data_dir)
        shards = read_shards(self.data_dir, tokenizer)
        for name, file in manifest.files.items():
            if name not in shards or shards[name].text_sha256 != file.sha256:
                raise ValueError(
                    f"{name} in {self.data_dir} is not tokenised with {self._tokenizer_name}: run `nlgmoe prepare-data "
                    f"--data_dir {self.data_dir} --tokenizer {self._tokenizer_name}` first."
                )
        self._tokenizer, self._manifest = tokenizer, manifest
        self._streams = {
            split: [open_shard(self.data_dir, tokenizer, f"{domain}.{split}") for domain in manifest.domains]
            for split in SPLITS
        }

    # ---- batches

    def train_dataloader(self) -> DataLoader[Sample]:
        """Endless micro-batches of this rank, from `samples_consumed` on."""
        rank, world_size = self._rank_and_world_size()
        source = PackedSource(self._stream("train"), self.seq_len, self.eod_id, self.seed)
        sampler = TrainingSampler(lambda: self.samples_consumed, self.micro_batch_size, rank, world_size)
        return self._loader(SourceDataset(source), sampler, self.micro_batch_size)

    def val_dataloader(self) -> DataLoader[Sample]:
        """This rank's share of the validation windows of all domains; equally many batches on every rank."""
        rank, world_size = self._rank_and_world_size()
        source = self._evaluation_source()
        sampler = EvaluationSampler(len(source), rank, world_size)
        return self._loader(SourceDataset(source), sampler, self.eval_micro_batch_size)

    def test_dataloader(self) -> DataLoader[Sample]:
        """As in validation: the pocket Pile has no third split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Sample]:
        """As in validation."""
        return self.val_dataloader()

    # ---- state

    def advance(self, samples: int) -> None:
        """Count samples that an optimizer step was taken on, over all ranks (never what was merely loaded)."""
        assert samples >= 0
        self.samples_consumed += samples

    def state_dict(self) -> dict[str, Any]:
        """`samples_consumed`, and the `fingerprint` of everything else that decides which samples those are."""
        return {"samples_consumed": self.samples_consumed, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint's run stood.

        Raises:
            ValueError: that run saw other data, or the same in another order.
        """
        ours, theirs = self.fingerprint(), state_dict["fingerprint"]
        differing = [
            f"{key} ({theirs.get(key)} there, {ours[key]} here)" for key in ours if theirs.get(key) != ours[key]
        ]
        if differing:
            raise ValueError(
                f"The checkpoint was trained on other data; these differ: {', '.join(differing)}. Set the data "
                "options as in that run to resume it, or load only the weights to start a new one."
            )
        self.samples_consumed = state_dict["samples_consumed"]

    def fingerprint(self) -> dict[str, str | int]:
        """What, beside `samples_consumed`, decides every training batch: option -> value or hash of what it names."""
        tokenizer, manifest = self._opened()
        texts = [manifest.files[f"{domain}.train"].sha256 for domain in manifest.domains]
        return {
            "data_dir": hashlib.sha256(" ".join(texts).encode()).hexdigest()[:16],
            "tokenizer": tokenizer.fingerprint[:16],
            "seq_len": self.seq_len,
            "seed": self.seed,
        }

    # ---- facts about the data

    @property
    def domains(self) -> list[str]:
        """Names of the domains; a batch's `domain` indexes them."""
        return self._opened()[1].domains

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._opened()[0].vocab_size

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token."""
        return self._opened()[0].eod_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._opened()[0].encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._opened()[0].decode(ids)

    def token_byte_lengths(self) -> torch.Tensor:
        """UTF-8 bytes of text that each token id spells, `[V]`; 0 for the end-of-document token."""
        return torch.as_tensor(self._opened()[0].token_bytes)

    def unigram_entropy(self) -> float:
        """Loss of the best context-free model, in nats per token.

        Cross-entropy of the training split's token frequencies (add-one smoothed) on the tokens that evaluation
        covers. A model that has learned anything of context is below it.
        """
        train = sum(np.bincount(stream, minlength=self.vocab_size) for stream in self._stream("train")) + 1
        source = self._evaluation_source()
        covered = np.concatenate([source.evaluated_tokens(domain) for domain in range(len(self.domains))])
        counts = np.bincount(covered, minlength=self.vocab_size)
        return float(-(counts * np.log(train / np.sum(train))).sum() / counts.sum())

    def xz_bits_per_byte(self) -> dict[str, float]:
        """What a general-purpose compressor needs for the text that evaluation covers: domain -> bits per byte, and "all"."""
        source = self._evaluation_source()
        texts = {}
        for domain, name in enumerate(self.domains):
            tokens = source.evaluated_tokens(domain)
            texts[name] = self.decode(tokens[tokens != self.eod_id].tolist()).encode()
        texts["all"] = b"".join(texts.values())
        return {name: 8 * len(lzma.compress(text, preset=9)) / len(text) for name, text in texts.items()}

    # ---- internals

    def _opened(self) -> tuple[Tokenizer, Manifest]:
        self.setup()
        assert self._tokenizer is not None and self._manifest is not None
        return self._tokenizer, self._manifest

    def _stream(self, split: str) -> list[np.ndarray]:
        self.setup()
        return self._streams[split]

    def _evaluation_source(self) -> EvaluationSource:
        return EvaluationSource(self._stream("validation"), self.seq_len, self.eod_id, self.max_eval_windows)

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(self, dataset: SourceDataset, sampler: Any, batch_size: int) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
