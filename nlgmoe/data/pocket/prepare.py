"""The three steps from nothing to shards, safe to run from several processes at once."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from nlgmoe.data.pocket.pocket_pile import Manifest, open_corpus
from nlgmoe.data.pocket.shards import TokenFile, build_shards
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
    shards: dict[str, TokenFile]


def prepare(data_dir: Path, tokenizer: str) -> Prepared:
    """Build what is missing of corpus, tokenizer and shards.

    One process at a time: on a shared file system every node comes here, and the later ones find the work done.

    Raises:
        ValueError: a download fails, a file is damaged, or the tokenizer is unknown or not usable.
    """
    with build_lock(data_dir):
        manifest = open_corpus(data_dir)
        loaded = load_tokenizer(tokenizer, data_dir)
        return Prepared(manifest, loaded, build_shards(data_dir, manifest, loaded))


@contextmanager
def build_lock(data_dir: Path) -> Iterator[None]:
    """Make the folder and be the only process that builds in it.

    Who may not write there, such as another user than the one who prepared it, needs no lock either: what is missing
    then ends in the error of the file that cannot be written.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / ".lock")
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        yield
    finally:
        lock.release()
