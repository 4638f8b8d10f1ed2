"""Text, tokenizers and batches.

Reading order: `text/` (documents of files), `tokenizer.py`, `indexed.py` with `indexed_writer.py` (tokens on disk);
`corpus.py` (the interface) and the corpora: `pocket_pile.py` (built by `pocket/`), `megatron_indexed.py`, `streaming/`,
`blend.py` with `interleaving.py`; `description.py` (what a checkpoint keeps of them); `packing.py`, `permutation.py`,
`sources.py`, `sampling.py` (samples, their order, and which rank reads them), `document_masks.py`, `accumulation.py` (sizes of
steps), `baselines.py`, `training_data.py` (the interface to training), `datamodule.py` (all of it, for Lightning).
"""

from nlgmoe.data.accumulation import BatchRampUp
from nlgmoe.data.blend import Blend, BlendPart
from nlgmoe.data.corpus import Corpus, OpenCorpus, Streams
from nlgmoe.data.datamodule import PileDataModule
from nlgmoe.data.indexed import IndexedDataset
from nlgmoe.data.indexed_writer import IndexedWriter
from nlgmoe.data.megatron_indexed import MegatronIndexed
from nlgmoe.data.pocket_pile import PocketPile
from nlgmoe.data.sources import EvaluationSource, PackedSource, Sample, TokenSource
from nlgmoe.data.streaming.streamed_text import StreamedText
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer
from nlgmoe.data.training_data import TrainingData

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
    "TrainingData",
    "load_tokenizer",
]
