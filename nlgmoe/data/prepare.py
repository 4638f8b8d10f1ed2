"""The three steps from nothing to shards, safe to run from several processes at once."""

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from nlgmoe.data.pocket_pile import Manifest, open_corpus
from nlgmoe.data.shards import Shard, build_shards
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """What a data folder holds once prepared for a tokenizer.

    Args:
        manifest: of the corpus.
        tokenizer: loaded.
        shards: `{domain}.{split}` -> facts.
    """

    manifest: Manifest
    tokenizer: Tokenizer
    shards: dict[str, Shard]


def prepare(data_dir: Path, tokenizer: str) -> Prepared:
    """Build what is missing of corpus, tokenizer and shards.

    One process at a time: on a shared file system every node comes here, and the later ones find the work done.

    Raises:
        ValueError: a download fails, a file is damaged, or the tokenizer is unknown or not usable.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / ".lock"):
        manifest = open_corpus(data_dir)
        loaded = load_tokenizer(tokenizer, data_dir)
        return Prepared(manifest, loaded, build_shards(data_dir, manifest, loaded))
