"""The corpus tokenised once: one indexed dataset a domain and split, reused until text or tokenizer change.

    data_dir/tokenized/{tokenizer's fingerprint}/{domain}.{split}.bin, .idx, and meta.json

A document's sequence is its tokens and the end-of-document token; the .bin is what `packing.py` calls `tokens`.
"""

import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from nlgmoe.data.indexed import IndexedDataset, token_dtype
from nlgmoe.data.indexed_writer import IndexedWriter
from nlgmoe.data.pocket.pocket_pile import Manifest, read_texts, text_path
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.files import write_json

BATCH_DOCUMENTS = 256  # encoded together: enough for every thread, little enough for memory


@dataclass(frozen=True)
class TokenFile:
    """Facts about one tokenised split of one domain.

    Args:
        text_sha256: of the jsonl file it was made from.
        tokens: number of tokens, one end-of-document token per document included.
        documents: number of documents.
        bytes: UTF-8 bytes of the texts; ends of documents are none.
    """

    text_sha256: str
    tokens: int
    documents: int
    bytes: int


def build_shards(data_dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> dict[str, TokenFile]:
    """Tokenise every file of the manifest that is not tokenised yet; `{domain}.{split}` -> facts."""
    folder = shard_folder(data_dir, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    known = read_shards(data_dir, tokenizer)
    for name, file in manifest.files.items():
        if name in known and known[name].text_sha256 == file.sha256 and _intact(folder / name, known[name]):
            continue
        known[name] = _tokenise(text_path(data_dir, name), folder / name, tokenizer, file.sha256)
        write_json(folder / "meta.json", {key: asdict(shard) for key, shard in known.items()})
    return known


def read_shards(data_dir: Path, tokenizer: Tokenizer) -> dict[str, TokenFile]:
    """Facts about what is tokenised already; empty if nothing is.

    Raises:
        ValueError: the list of them is damaged.
    """
    path = shard_folder(data_dir, tokenizer) / "meta.json"
    if not path.exists():
        return {}
    try:
        return {name: TokenFile(**facts) for name, facts in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} to tokenise again") from error


def open_shard(data_dir: Path, tokenizer: Tokenizer, name: str) -> np.ndarray:
    """All tokens of `{domain}.{split}`, memory-mapped, [N].

    Raises:
        ValueError: the shard is missing or damaged.
    """
    return IndexedDataset(shard_folder(data_dir, tokenizer) / name).tokens


def shard_folder(data_dir: Path, tokenizer: Tokenizer) -> Path:
    """Where the shards of a tokenizer lie."""
    return data_dir / "tokenized" / tokenizer.fingerprint[:12]


def _tokenise(text: Path, prefix: Path, tokenizer: Tokenizer, text_sha256: str) -> TokenFile:
    tokens = documents = num_bytes = 0
    texts = read_texts(text)
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        while batch := list(islice(texts, BATCH_DOCUMENTS)):
            for ids in tokenizer.encode_batch(batch):
                writer.add_document([*ids, tokenizer.eod_id])
                tokens += len(ids) + 1
            documents += len(batch)
            num_bytes += sum(len(document.encode()) for document in batch)
    return TokenFile(text_sha256, tokens, documents, num_bytes)


def _intact(prefix: Path, shard: TokenFile) -> bool:
    try:
        return len(IndexedDataset(prefix).tokens) == shard.tokens
    except ValueError:
        return False
