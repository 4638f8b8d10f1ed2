"""`PileDataModule`: batches of a corpus. Its state is the number of samples trained on."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from nlgmoe.data import sampling
from nlgmoe.data.blend import OpenBlend
from nlgmoe.data.corpus import Corpus, OpenCorpus, own_tokenizer
from nlgmoe.data.pocket_pile import PocketPile
from nlgmoe.data.samples import ORDER, EvaluationSource, Sample, TokenSource
from nlgmoe.data.streams import Cursors
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import DEFAULT_TOKENIZER
from nlgmoe.data.tokens import Tokens, count_tokens, unigram_entropy, xz_bits_per_byte
from nlgmoe.data.training_data import TrainingData
from nlgmoe.device import is_accelerator
from nlgmoe.validation import SettingError, require, require_at_least


class PileDataModule(TrainingData):
    """A corpus as batches of packed sequences.

    A batch is a `nlgmoe.batch.Batch`, with `loss_mask` if `mask_eod_loss`, and `document` if `document_attention`. Training
    batches are endless; set `max_steps` or `train_tokens`. They also have `samples`, and with a streamed corpus a `cursor`, which
    is removed before the transfer to the device.

    Args:
        data_dir: folder of tokenizers, the pocket Pile and its tokenised shards.
        tokenizer: "gpt2", "pocket-1k", "pocket-4k", "pocket-8k", or a folder with tokenizer.json or vocab.json and merges.txt;
            None: the corpus's own, or pocket-8k.
        corpus: corpus to train on; None: the pocket Pile in `data_dir`.
        micro_batch_size: sequences per rank and forward pass in training.
        global_batch_size: sequences per optimizer step, over all ranks; it determines the trainer's
            `accumulate_grad_batches`. None: set `accumulate_grad_batches` on the trainer.
        batch_ramp_up: start with smaller batches, which grow to `global_batch_size`; null: constant batch size.
        eval_micro_batch_size: sequences per rank and forward pass in evaluation; None: as in training.
        seq_len: tokens per sequence, in training and evaluation; null, the default of train.py: the model's `seq_len`.
        seed: seed of the order of the training sequences.
        num_workers: processes that load batches, per rank; 0: load in the training process.
        max_eval_windows: sequences evaluated per domain, the first ones; None: all.
        document_attention: restrict attention to a position's own document, and count positions from its beginning, in
            training and evaluation; otherwise attention crosses the borders of packed documents.
        mask_eod_loss: exclude the first token of each document from the loss, in training and evaluation, because the
            end-of-document token before it does not help to predict it.

    Raises:
        ValueError: a size is not positive, or micro-batches cannot make up a batch of the ramp-up.
    """

    def __init__(
        self,
        data_dir: str = "data/pocket_pile",
        tokenizer: str | None = None,
        corpus: Corpus | None = None,
        micro_batch_size: int = 8,
        global_batch_size: int | None = None,
        batch_ramp_up: sampling.BatchRampUp | None = None,
        eval_micro_batch_size: int | None = None,
        seq_len: int | None = 256,
        seed: int = 1234,
        num_workers: int = 0,
        max_eval_windows: int | None = None,
        document_attention: bool = False,
        mask_eod_loss: bool = False,
    ) -> None:
        super().__init__()
        if seq_len is None:  # train.py and `load_config` have replaced it by the model's
            raise SettingError("seq_len=None: the length of sequences is unknown; give it, at most the model's")
        require(str(data_dir) != "", "data.data_dir is empty; give a folder")
        self.data_dir = Path(data_dir)
        self.corpus = corpus or PocketPile()
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.batch_ramp_up = batch_ramp_up
        self.eval_micro_batch_size = micro_batch_size if eval_micro_batch_size is None else eval_micro_batch_size
        self.seq_len: int = seq_len
        self.seed = seed
        self.num_workers = num_workers
        self.max_eval_windows = max_eval_windows
        self.document_attention = document_attention
        self.mask_eod_loss = mask_eod_loss
        sizes = ("micro_batch_size", "global_batch_size", "eval_micro_batch_size", "seq_len", "max_eval_windows")
        require_at_least(1, self, *sizes)
        require_at_least(0, self, "seed", "num_workers")
        if batch_ramp_up is not None:
            sampling.check_ramp_up(batch_ramp_up, global_batch_size, micro_batch_size)
        self._cursors = Cursors()
        self._has_cursors = False
        self._tokenizer_name = tokenizer
        self._open_corpus: OpenCorpus | None = None

    # ---- building and opening

    def prepare_data(self) -> None:
        """Build the corpus and the tokenizer if they are missing (one process per node)."""
        self.corpus.prepare(self.data_dir, self._named_tokenizer())

    def setup(self, stage: str | None = None) -> None:
        """Open tokenizer and corpus; before a fit, set the trainer's accumulation."""
        if stage == "fit" and self.trainer is not None and self.global_batch_size is not None:
            # Set before it is read: `configure_model` makes DeepSpeed's configuration, and the loops begin later.
            self.trainer.accumulate_grad_batches = self._accumulation(self.global_batch_size)
        if self._open_corpus is None:
            self._open_corpus = self.corpus.open(self.data_dir, self._named_tokenizer())

    # ---- the text

    @property
    def tokenizer(self) -> Tokenizer:
        """The corpus's tokenizer."""
        return self._opened().tokenizer

    @property
    def domains(self) -> list[str]:
        """Names of the domains; a batch's `domain` indexes them."""
        return self._opened().domains

    @property
    def domain_shares(self) -> list[float] | None:
        """Share of each domain in the training samples of a blend, `[D]`; None for other corpora."""
        corpus = self._opened()
        return corpus.shares if isinstance(corpus, OpenBlend) else None

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def token_counts(self) -> list[int]:
        """Return the number of training tokens of each id, `[V]`; of a long corpus, of the first ones."""
        return count_tokens(self._opened().tokens["train"], self.vocab_size).tolist()

    def unigram_entropy(self) -> float:
        """Compute the loss of the best context-free model on the tokens that have a loss in evaluation, in nats per token."""
        evaluated = list(self._evaluated_tokens().values())
        if self.mask_eod_loss:
            eod = self.tokenizer.eod_id
            evaluated = [tokens[1:][tokens[:-1] != eod] for tokens in evaluated]  # the first one has no loss either
        return unigram_entropy(self._opened().tokens["train"], evaluated, self.vocab_size)

    def xz_bits_per_byte(self) -> dict[str, float]:
        """Compress the evaluated text by a general-purpose compressor: domain -> bits per byte, and "all"."""
        return xz_bits_per_byte(self._evaluated_tokens(), self.tokenizer)

    # ---- batches

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return this rank's endless micro-batches, from sample `samples_consumed` on."""
        rank, world_size = self._rank_and_world_size()
        source = self._opened().training_source(self.seq_len, self.seed)
        self._has_cursors = source.has_cursors
        source.seek(self._cursors.latest())
        full_batch_size = self.global_batch_size or self.micro_batch_size * world_size
        sampler = sampling.TrainingSampler(
            self._begin,
            lambda samples: sampling.batch_size_after(samples, self.seq_len, full_batch_size, self.batch_ramp_up),
            sampling.micro_batches_per_step(full_batch_size, self.micro_batch_size, world_size),
            rank,
            world_size,
        )
        batches = sampling.MicroBatches(self._dataset(source))
        # Items are micro-batches: Lightning would divide those of a batch sampler between ranks again.
        return self._loader(batches, sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return this rank's share of the validation windows of all domains; every rank has equally many batches."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the same for the test split, or the validation split if there is none (the pocket Pile)."""
        return self._evaluation_loader("test" if "test" in self._opened().tokens else "validation")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return the validation windows."""
        return self.val_dataloader()

    def has_equal_batches(self) -> bool:
        """Return whether each micro-batch has as many tokens on every rank; False for a subclass with another loader."""
        return type(self).train_dataloader is PileDataModule.train_dataloader

    def batch_size_after(self, samples: int) -> int:
        """Return the sequences of the optimizer step after the first `samples` samples, over all ranks."""
        full_batch_size = self.global_batch_size
        if full_batch_size is None:
            accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
            full_batch_size = self.micro_batch_size * self._rank_and_world_size()[1] * accumulated
        return sampling.batch_size_after(samples, self.seq_len, full_batch_size, self.batch_ramp_up)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Remove the cursors from a batch, and store them."""
        self._cursors.take(batch)
        return batch

    # ---- state

    def advance(self, samples: int) -> None:
        """Count the samples of an optimizer step, over all ranks."""
        super().advance(samples)
        self._cursors.commit(samples // self._rank_and_world_size()[1])

    def state_dict(self) -> dict[str, Any]:
        """Add the `cursors` of all streams, which is a collective if there are some."""
        cursors = self._cursors.gather() if self._has_cursors else self._cursors.latest()
        return super().state_dict() | ({"cursors": cursors} if cursors else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a checkpoint's run; see `TrainingData.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._cursors.load(state_dict.get("cursors", []))

    def fingerprint(self) -> dict[str, str | int]:
        """Return options and hashes that, with `samples_consumed`, determine the training batches."""
        return {
            **{f"corpus.{name}": value for name, value in self._opened().fingerprint.items()},
            "tokenizer": self.tokenizer.fingerprint[:16],
            "seq_len": self.seq_len,
            "seed": self.seed,
            "order": ORDER,
        }

    # ---- internals

    def _named_tokenizer(self) -> str:
        return self._tokenizer_name or own_tokenizer(self.corpus) or DEFAULT_TOKENIZER

    def _opened(self) -> OpenCorpus:
        self.setup()
        assert self._open_corpus is not None
        return self._open_corpus

    def _evaluation_source(self, split: str) -> EvaluationSource:
        return EvaluationSource(
            self._opened().tokens[split], self.seq_len, self.tokenizer.eod_id, self.max_eval_windows
        )

    def _evaluated_tokens(self) -> dict[str, Tokens]:
        source = self._evaluation_source("validation")
        return {name: source.evaluated_tokens(domain) for domain, name in enumerate(self.domains)}

    def _evaluation_loader(self, split: str) -> DataLoader[Sample]:
        source, size = self._evaluation_source(split), self.eval_micro_batch_size
        sampler = sampling.EvaluationSampler(len(source), *self._rank_and_world_size())
        return self._loader(self._dataset(source), sampler, batch_size=size, collate_fn=sampling.collate)

    def _accumulation(self, global_batch_size: int) -> int:
        _, world_size = self._rank_and_world_size()
        derived = sampling.micro_batches_per_step(global_batch_size, self.micro_batch_size, world_size)
        assert self.trainer is not None
        if (given := self.trainer.accumulate_grad_batches) not in (1, derived):
            both = f"trainer.accumulate_grad_batches={given} and data.global_batch_size={global_batch_size}"
            raise SettingError(f"{both} are both set, and the latter makes it {derived}; remove one of them")
        return derived

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _begin(self) -> int:
        """Return the first sample of an iteration; discard samples prefetched by an earlier one."""
        self._cursors.discard_pending()
        return self.samples_consumed

    def _dataset(self, source: TokenSource) -> sampling.SourceDataset:
        eod, attention, mask_loss = self.tokenizer.eod_id, self.document_attention, self.mask_eod_loss
        mark = partial(sampling.mark_documents, eod_id=eod, attention=attention, mask_loss=mask_loss)
        return sampling.SourceDataset(source, self.vocab_size, self.domains, mark)

    def _loader(self, dataset: Dataset[Any], sampler: Any, **batching: Any) -> DataLoader[Sample]:
        if self.num_workers > 0:  # workers tokenise in parallel, and threads do not survive a fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return DataLoader(
            dataset,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=sampling.ignore_worker_signals,
            persistent_workers=self.num_workers > 0,
            # Copies from pinned memory to an accelerator are asynchronous.
            pin_memory=self.trainer is not None and is_accelerator(self.trainer.strategy.root_device),
            **batching,
        )
