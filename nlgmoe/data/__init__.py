"""Text, tokenizers and batches.

Reading order: `text/` (documents out of files), `tokenizer.py`, `indexed.py` with `indexed_writer.py` (tokens on disk); what there is to train on:
`corpus.py` (the seam, and the pocket Pile, with `pocket/`),
`megatron_indexed.py`, `streaming/`, `blend.py` with `interleaving.py` (several as one), `description.py` (what a checkpoint
keeps of it); `packing.py`, `permutation.py`, `sources.py` and `sampling.py` (which tokens make up which sample, in what
order, and whose it is), `document_masks.py` (where documents begin), `accumulation.py` (how large a step is, and how many
micro-batches make it up), `baselines.py` (what a model has to beat), `datamodule.py` (all of it, for Lightning).
"""

from nlgmoe.data.accumulation import BatchRampUp
from nlgmoe.data.blend import Blend, BlendPart
from nlgmoe.data.corpus import Corpus, OpenCorpus, PocketPile, Streams
from nlgmoe.data.datamodule import PileDataModule
from nlgmoe.data.indexed import IndexedDataset
from nlgmoe.data.indexed_writer import IndexedWriter
from nlgmoe.data.megatron_indexed import MegatronIndexed
from nlgmoe.data.pocket.pocket_pile import build_pocket_pile
from nlgmoe.data.sources import EvaluationSource, PackedSource, Sample, TokenSource
from nlgmoe.data.streaming.streamed_text import StreamedText
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
