"""Text, tokenizers and batches.

Reading order: `source_files.py`, `documents.py` (text of files), `tokenizer.py`, `tokenizer_loading.py`; `prefix.py`,
`indexed.py`, `tokens.py` (tokens on disk), `build_indexed.py` (from text to tokens); `samples.py` (windows and their order);
`corpus.py` (the interface) and the corpora: `pocket_pile.py`, `megatron_indexed.py`, `streamed_text.py`, `blend.py`;
`sampling.py` (steps, and the samples of a rank), `training_data.py` (the interface to training), `datamodule.py` (all of it,
for Lightning).
"""

from nlgmoe.data.blend import Blend, BlendPart
from nlgmoe.data.corpus import Corpus, OpenCorpus
from nlgmoe.data.datamodule import PileDataModule
from nlgmoe.data.indexed import IndexedDataset, IndexedWriter
from nlgmoe.data.megatron_indexed import MegatronIndexed
from nlgmoe.data.pocket_pile import PocketPile
from nlgmoe.data.samples import Sample, TokenSource
from nlgmoe.data.sampling import BatchRampUp
from nlgmoe.data.streamed_text import StreamedText
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import load_tokenizer
from nlgmoe.data.training_data import TrainingData

__all__ = [
    "BatchRampUp",
    "Blend",
    "BlendPart",
    "Corpus",
    "IndexedDataset",
    "IndexedWriter",
    "MegatronIndexed",
    "OpenCorpus",
    "PileDataModule",
    "PocketPile",
    "Sample",
    "StreamedText",
    "TokenSource",
    "Tokenizer",
    "TrainingData",
    "load_tokenizer",
]
