"""`PocketPile`: a corpus in the data folder, text and tokens. `pocket/` builds its text and tokenizers on first use.

    data_dir/tokenized/FINGERPRINT/  of a tokenizer: {domain}.{split}.bin, .idx, and
                                     meta.json: {domain}.{split} -> text_sha256 of the jsonl file, xxh3 of the tokens

A document's sequence is its tokens and the end-of-document token; the .bin is what `samples.py` calls `tokens`.
"""

import json
from itertools import islice
from pathlib import Path

import xxhash

from nlgmoe.data.corpus import Fingerprint, OpenCorpus, TokenArrays, build_lock
from nlgmoe.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from nlgmoe.data.pocket.build import SPLITS, Manifest, open_corpus, read_manifest, read_texts, text_path
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import BUILT, load_tokenizer
from nlgmoe.files import write_json
from nlgmoe.validation import RunError, SettingError

BATCH_DOCUMENTS = 256  # encoded together


class PocketPile:
    """The corpus in `data_dir`, tokenised there once: the pocket Pile, or one written by `write_corpus`.

    Args:
        domains: names of the domains to read, in this order; None: all.

    Raises:
        ValueError: `domains` is empty, or names one twice.
    """

    def __init__(self, domains: list[str] | None = None) -> None:
        if domains is not None and (not domains or len(set(domains)) < len(domains)):
            raise SettingError(f"domains={domains} must name one domain or several, each once; leave it out for all.")
        self._domains = domains

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Build missing text, tokenizer and tokens of all domains."""
        prepare(data_dir, tokenizer)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Map the tokens of a tokenizer."""
        manifest = read_manifest(data_dir)
        if manifest is None:
            raise SettingError(f"No corpus in {data_dir}: run `nlgmoe prepare-data --data-dir {data_dir}` first.")
        domains = manifest.domains if self._domains is None else self._domains
        if unknown := sorted(set(domains) - set(manifest.domains)):
            raise SettingError(
                f"domains={self._domains}: {data_dir} has no {unknown[0]}; choose from {', '.join(manifest.domains)}."
            )
        loaded = load_tokenizer(tokenizer, data_dir)
        folder = token_folder(data_dir, loaded)
        checksums = _read_checksums(folder)
        for name, file in manifest.files.items():
            if name not in checksums or checksums[name]["text_sha256"] != file.sha256:
                raise RunError(
                    f"{name} in {data_dir} is not tokenised with {tokenizer}: run `nlgmoe prepare-data "
                    f"--data-dir {data_dir} --tokenizer {tokenizer}` first."
                )
        tokens = {
            split: [IndexedDataset(folder / f"{domain}.{split}").tokens for domain in domains] for split in SPLITS
        }
        fingerprint: Fingerprint = {"domains": ", ".join(domains)}
        fingerprint |= {domain: manifest.files[f"{domain}.train"].sha256[:16] for domain in domains}
        return TokenArrays(loaded, list(domains), tokens, fingerprint)


def token_folder(data_dir: Path, tokenizer: Tokenizer) -> Path:
    """Return the folder of a tokenizer's tokens."""
    return data_dir / "tokenized" / tokenizer.fingerprint[:12]


def _read_checksums(folder: Path) -> dict[str, dict[str, str]]:
    """Return the content of meta.json; empty if there is none."""
    path = folder / "meta.json"
    if not path.exists():
        return {}
    try:
        return {
            name: {kind: facts[kind] for kind in ("text_sha256", "xxh3")}
            for name, facts in json.loads(path.read_text()).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); delete {folder} to tokenise again") from error


def prepare(data_dir: Path, tokenizer: str) -> None:
    """Build missing corpus, tokenizer and tokens.

    One process at a time: on a shared file system every node calls this, and later calls have nothing to build.
    """
    if tokenizer not in BUILT:
        load_tokenizer(tokenizer, data_dir)  # an unknown one is refused before the corpus is built
    with build_lock(data_dir):
        manifest = open_corpus(data_dir)
        tokenise(data_dir, manifest, load_tokenizer(tokenizer, data_dir))


def tokenise(data_dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Tokenise every file of the manifest whose text has changed or whose tokens are missing or damaged."""
    folder = token_folder(data_dir, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    done = _read_checksums(folder)
    for name, file in manifest.files.items():
        if name in done and done[name]["text_sha256"] == file.sha256 and _intact(folder / name, done[name]["xxh3"]):
            continue
        texts = read_texts(text_path(data_dir, name), tokenizer.missing_bytes)
        with IndexedWriter(folder / name, token_dtype(tokenizer.vocab_size)) as writer:
            while batch := list(islice(texts, BATCH_DOCUMENTS)):
                for ids in tokenizer.encode_batch(batch):
                    writer.add_document([*ids, tokenizer.eod_id])
        xxh3 = xxhash.xxh3_64_hexdigest(IndexedDataset(folder / name).tokens.data)
        done[name] = {"text_sha256": file.sha256, "xxh3": xxh3}
        write_json(folder / "meta.json", done)


def _intact(prefix: Path, xxh3: str) -> bool:
    try:
        return xxhash.xxh3_64_hexdigest(IndexedDataset(prefix).tokens.data) == xxh3
    except ValueError:
        return False
