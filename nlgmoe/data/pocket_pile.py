"""`PocketPile`: a corpus in the data folder, text and tokens. `pocket_build.py` builds its text on first use.

    data_dir/tokenized/FINGERPRINT/  of a tokenizer: {domain}.bin, .idx, .json (`prefix.py`), its validation documents last

A document's sequence is its tokens and the end-of-document token; the .bin is what `samples.py` calls `tokens`.
"""

from itertools import chain, islice
from pathlib import Path

import xxhash

from nlgmoe.data.corpus import Fingerprint, OpenCorpus, build_lock, hash_of
from nlgmoe.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from nlgmoe.data.pocket_build import SPLITS, Manifest, open_corpus, read_manifest, read_texts, text_path
from nlgmoe.data.prefix import Sidecar, describe
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import BUILT, load_tokenizer
from nlgmoe.data.tokens import Tokens
from nlgmoe.validation import RunError, SettingError

BATCH_DOCUMENTS = 256  # encoded together


class PocketPile:
    """The corpus in `data_dir`, tokenised there once: the pocket Pile, or one written by `write_corpus`.

    Args:
        domains: names of the domains to read, in this order; None: all.
        tokenizer: the tokenizer if `data.tokenizer` is null; None: that of other parts of a blend, or pocket-8k.
    """

    def __init__(self, domains: list[str] | None = None, tokenizer: str | None = None) -> None:
        if domains is not None and (not domains or len(set(domains)) < len(domains)):
            raise SettingError(f"domains={domains} must name one domain or several, each once; leave it out for all.")
        self._domains = domains
        self._tokenizer = tokenizer

    def own_tokenizer(self) -> str | None:
        """Return the argument `tokenizer`."""
        return self._tokenizer

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Build missing text, tokenizer and tokens of all domains.

        One process at a time: on a shared file system every node calls this, and later calls have nothing to build.
        """
        if tokenizer not in BUILT:
            load_tokenizer(tokenizer, data_dir)  # an unknown one is refused before the corpus is built
        with build_lock(data_dir):
            manifest = open_corpus(data_dir)
            _tokenise(data_dir, manifest, load_tokenizer(tokenizer, data_dir))

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Map the tokens of a tokenizer."""
        manifest = read_manifest(data_dir)
        if manifest is None:
            raise SettingError(f"No corpus in {data_dir}: run `nlgmoe prepare-data --data-dir {data_dir}` first.")
        domains = manifest.domains if self._domains is None else self._domains
        if unknown := sorted(set(domains) - set(manifest.domains)):
            known = ", ".join(manifest.domains)
            raise SettingError(f"domains={self._domains}: {data_dir} has no {unknown[0]}; choose from {known}.")
        loaded = load_tokenizer(tokenizer, data_dir)
        folder = token_folder(data_dir, loaded)
        tokens: dict[str, list[Tokens]] = {split: [] for split in SPLITS}
        for domain in domains:
            sidecar = Sidecar.read(folder / domain)
            if sidecar is None or sidecar.text != _text_hash(manifest, domain):
                command = f"nlgmoe prepare-data --data-dir {data_dir} --tokenizer {tokenizer}"
                raise RunError(f"{domain} in {data_dir} is not tokenised with {tokenizer}: run `{command}` first.")
            dataset = IndexedDataset(folder / domain)
            first = dataset.first_token(sidecar.documents - sidecar.held_out)
            for split, part in zip(SPLITS, (dataset.tokens[:first], dataset.tokens[first:]), strict=True):
                tokens[split].append(part)
        fingerprint: Fingerprint = {"domains": ", ".join(domains)}
        fingerprint |= {domain: manifest.files[f"{domain}.train"].sha256[:16] for domain in domains}
        return OpenCorpus(loaded, list(domains), tokens, fingerprint)


def token_folder(data_dir: Path, tokenizer: Tokenizer) -> Path:
    """Return the folder of a tokenizer's tokens."""
    return data_dir / "tokenized" / tokenizer.fingerprint[:12]


def _text_hash(manifest: Manifest, domain: str) -> str:
    return hash_of([manifest.files[f"{domain}.{split}"].sha256 for split in SPLITS])


def _tokenise(data_dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Tokenise every domain of the manifest whose text has changed or whose tokens are missing or damaged."""
    folder = token_folder(data_dir, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for domain in manifest.domains:
        prefix, text = folder / domain, _text_hash(manifest, domain)
        if _intact(prefix, text):
            continue
        files = [manifest.files[f"{domain}.{split}"] for split in SPLITS]
        paths = [text_path(data_dir, f"{domain}.{split}") for split in SPLITS]
        texts = chain.from_iterable(read_texts(path, tokenizer.missing_bytes) for path in paths)
        with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
            while batch := list(islice(texts, BATCH_DOCUMENTS)):
                for ids in tokenizer.encode_batch(batch):
                    writer.add_document(tokenizer.closed(ids))
            size = sum(file.bytes for file in files)
            writer.sidecar = describe(prefix, tokenizer, domain, files[-1].documents, size, text)


def _intact(prefix: Path, text: str) -> bool:
    try:
        dataset, sidecar = IndexedDataset(prefix), Sidecar.read(prefix)
        dataset.check()
    except ValueError:
        return False
    xxh3 = xxhash.xxh3_64_hexdigest(dataset.tokens.data)
    return sidecar is not None and (sidecar.text, sidecar.xxh3) == (text, xxh3)
