"""The pocket Pile: its text, a tokenizer and its tokens, and a table of them."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.data.pocket.build import SPLITS, read_manifest
from nlgmoe.data.pocket.tokenizers import load_tokenizer
from nlgmoe.data.pocket_pile import PocketPile, prepare, token_folder


def prepare_pocket_pile(data_dir: Path, tokenizer: str) -> None:
    """Build what is missing, and print a summary."""
    prepare(data_dir, tokenizer)
    manifest, loaded = read_manifest(data_dir), load_tokenizer(tokenizer, data_dir)
    assert manifest is not None
    shards = token_folder(data_dir, loaded)

    print(f"{'domain':<12} {'split':<10} {'documents':>9} {'MB':>7} {'tokens':>10} {'bytes/token':>11}")
    total = [0, 0, 0]
    corpus = PocketPile().open(data_dir, tokenizer)
    for number, domain in enumerate(manifest.domains):
        for split, arrays in zip(
            SPLITS, (corpus.training_tokens(), corpus.evaluation_tokens("validation")), strict=True
        ):
            assert arrays is not None
            file, tokens = manifest.files[f"{domain}.{split}"], len(arrays[number])
            _print_row(domain, split, file.documents, file.bytes, tokens)
            total = [sum(pair) for pair in zip(total, (file.documents, file.bytes, tokens), strict=True)]
    _print_row("total", "", *total)
    print(f"text       {data_dir / 'text'}")
    print(f"tokenizer  {loaded.describe()}")
    print(f"shards     {shards}")
    print(f"licences   {data_dir / 'manifest.json'}")


def _print_row(domain: str, split: str, documents: int, size: int, tokens: int) -> None:
    print(f"{domain:<12} {split:<10} {documents:>9,} {size / 1e6:>7.2f} {tokens:>10,} {size / tokens:>11.2f}")
