"""Text, tokenizers and batches.

Reading order: `pocket_pile.py` (what text there is; with `packages.py`, `extraction.py`, `deduplication.py`),
`documents.py` (documents of JSON lines and Parquet; with `parquet.py`, `records.py`, `bad_data.py`), `tokenizer.py`,
`indexed.py` and `shards.py` (tokens on disk), `build_indexed.py` (from files of text to tokens on disk), `prepare.py`
(the pocket Pile's steps in a row), `corpus.py` and `megatron_indexed.py` (the tokens of a corpus by split and domain),
`packing.py`, `permutation.py`, `sources.py` and `sampling.py` (which tokens make up which sample, in what order, and
whose it is), `streaming.py` (a corpus that is read while training; with `text_files.py`, `held_text.py`,
`logical_stream.py`, `streamed_source.py`, `cursors.py`), `blend.py` and `interleaving.py` (several corpora as one),
`document_masks.py` (where documents begin), `accumulation.py` (how large a step is, and how many micro-batches make it up),
`baselines.py` (what a model has to beat), `datamodule.py` (all of it, for Lightning).
"""

from nlgmoe.data.accumulation import BatchRampUp
from nlgmoe.data.blend import Blend, BlendPart
from nlgmoe.data.corpus import Corpus, OpenCorpus, PocketPile, Streams
from nlgmoe.data.datamodule import PileDataModule
from nlgmoe.data.indexed import IndexedDataset, IndexedWriter
from nlgmoe.data.megatron_indexed import MegatronIndexed
from nlgmoe.data.pocket_pile import build_pocket_pile
from nlgmoe.data.sources import EvaluationSource, PackedSource, Sample, TokenSource
from nlgmoe.data.streaming import StreamedText
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BatchRampUp",
    "Blend",
    "BlendPart",
    "Corpus",
    "EvaluationSource",
    "IndexedDataset",
    "IndexedWriter",
    "MegatronIndexed",
    "OpenCorpus",
    "PackedSource",
    "PileDataModule",
    "PocketPile",
    "Sample",
    "StreamedText",
    "Streams",
    "TokenSource",
    "Tokenizer",
    "build_pocket_pile",
    "load_tokenizer",
]
