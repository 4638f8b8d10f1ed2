"""A corpus of your own text, in Megatron's indexed format, and a tokenizer trained on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from tqdm import tqdm

from nlgmoe.commands.prepare_data import DATA_DIR
from nlgmoe.data.build_indexed import Progress, build_indexed, check_new
from nlgmoe.data.corpus import build_lock
from nlgmoe.data.documents import Fields, read_shares
from nlgmoe.data.megatron_indexed import split_of
from nlgmoe.data.source_files import Shard, describe_file, input_files, is_plain_text
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import BUILT, load_tokenizer, train_tokenizer
from nlgmoe.validation import SettingError

PIECES, PIECE_BYTES = 20, 1_000_000  # a single text file is cut into so many documents, or more of so many bytes
TRAINING_BYTES = 1_000_000_000  # of text, about, on which a tokenizer is trained: the first of each file
SHOWN = 10  # skipped documents that are named


def prepare_text(
    data_dir: str,
    tokenizer: str,
    input: str | list[str],
    output: Path,
    vocab_size: int | None,
    text_field: str,
    skips: bool,
    reads: bool,
    workers: int | None,
    domain: str | None,
    shard: str | None,
) -> None:
    """Tokenise files, and print a summary and the command that trains on them; arguments as of `prepare_data`."""
    part = None if shard is None else Shard.parse(shard)
    files, fields = _files_and_fields(input, text_field)
    check_new(prefix := output)
    if part is not None:
        check_new(prefix := part.prefix(output))
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
        number = min(progress.file + 1, len(files))
        bar.set_postfix_str(f"file {number} of {len(files)}, {progress.tokens:,} tokens", False)
        bar.update(progress.bytes - bar.n)

    with bar:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        skip_or_stop = skip if skips else None
        built = build_indexed(files, prefix, loaded, fields, workers or cpus, update_bar, skip_or_stop, domain, part)
    _print_built(built, len(files), prefix, loaded, data_dir, output if part else None)


def _files_and_fields(input: str | list[str], text_field: str) -> tuple[list[str], Fields]:
    files, text_bytes = input_files(input), None
    if len(files) == 1 and is_plain_text(files[0]):
        _note(f"note: {files[0]} is the only file: it is cut at ends of lines into documents")
        text_bytes = min(describe_file(files[0]).bytes // PIECES + 1, PIECE_BYTES)
    return files, Fields(text=text_field, text_bytes=text_bytes)


def _train(files: list[str], fields: Fields, skips: bool, vocab_size: int, folder: Path) -> Tokenizer:
    _note(f"training a tokenizer of {vocab_size:,} ids")
    return train_tokenizer(_texts(files, fields, skips), vocab_size, folder)


def _texts(files: list[str], fields: Fields, skips: bool) -> Iterator[str]:
    ignore = (lambda line: None) if skips else None  # the build names them
    for record, _ in read_shares([describe_file(file) for file in files], fields, TRAINING_BYTES, ignore):
        assert isinstance(record.content, str)
        yield record.content


def _note(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _print_built(
    built: Progress, files: int, prefix: Path, tokenizer: Tokenizer, data_dir: str, whole: Path | None = None
) -> None:
    print(f"files      {files:,}")
    print(f"documents  {built.documents:,}")
    print(f"text       {built.bytes / 1e6:,.2f} MB")
    print(f"tokens     {built.tokens:,}, {built.bytes / max(1, built.tokens):.2f} bytes each")
    if built.skipped:
        print(f"left out   {built.skipped:,} documents, files or ends of files that cannot be used")
    if built.empty:
        print(f"empty      {built.empty:,} documents without text, which are left out")
    print(f"corpus     {prefix}.bin, {prefix}.idx, {prefix}.json")
    print(f"tokenizer  {tokenizer.describe()}")
    if whole is not None:
        print(f"validation {built.held_out:,} documents, chosen by hash")
        print(f"When all shards are written, the corpus has the prefix {whole}.")
        return
    if built.documents < 2:
        print("split      one document cannot be divided into training and validation: give more files")
        return
    (_, first, count, _), (_, first_token, tokens, _) = split_of(prefix, built.held_out)
    print(f"training   {first:,} documents, {first_token:,} tokens")
    print(f"validation {count - first:,} documents, {tokens - first_token:,} tokens, chosen by hash and put last")
    options = {"data.corpus": "nlgmoe.data.MegatronIndexed", "data.corpus.init_args.prefix": str(prefix)}
    if tokenizer.name in BUILT and data_dir != DATA_DIR:
        options["data.data_dir"] = data_dir
    options["trainer.default_root_dir"] = f"runs/{prefix.name}"  # not the quickstart's, which may hold a run
    words = " ".join(f"--{name} {quote(value)}" for name, value in options.items())
    print(f"nlgmoe fit --config configs/quickstart.yaml {words}")


def train_alone(input: str | list[str], text_field: str, skips: bool, vocab_size: int, folder: Path) -> None:
    """Train a tokenizer on files, save it in a new folder, and describe it."""
    if vocab_size < 257 or str(folder) in BUILT or (folder.exists() and any(folder.iterdir())):
        problem = f"tokenizer={folder} is to be trained, with vocab_size={vocab_size}"
        raise SettingError(f"{problem}; give a new folder for it, and at least 257 ids")
    loaded = _train(*_files_and_fields(input, text_field), skips, vocab_size, folder)
    print(f"tokenizer  {loaded.describe()}")
