"""`StreamedText`: a corpus that is tokenised while training on it, from the Hugging Face hub or from files.

`datasets` finds the files, as in its `load_dataset`; `documents.py` reads them. The streaming of `datasets` shards whole
files, does not name bad lines, and resumes by reading a file from its beginning.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from nlgmoe.data.corpus import Fingerprint, OpenCorpus, build_lock, hash_of
from nlgmoe.data.documents import MAX_DOCUMENT_BYTES, Fields
from nlgmoe.data.samples import TokenSource
from nlgmoe.data.streamed_files import cache_eval_tokens, find_files, open_eval_cache
from nlgmoe.data.streams import StreamConfig, StreamedSource
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import load_tokenizer
from nlgmoe.validation import SettingError, require, require_at_least

OTHER = "other"


class StreamedText:
    """JSON lines (plain, .gz or .zst) or Parquet, whose text data workers tokenise and pack.

    Training reads `num_streams` streams, which do not depend on ranks and workers, and resumes at its position.
    `prepare` stores the first documents of each domain's validation and test files, for evaluation, in
    `data_dir/streamed`.

    Args:
        path: name of a data set on the hub, a local folder, or the address of a folder that fsspec reads (`s3://bucket/pile`).
        data_files: split -> names or patterns in it, or addresses, such as `{train: train/*.jsonl.zst, validation:
            val.jsonl.zst}`; "train" and "validation" are required, "test" is optional. None: files that `datasets` finds by
            their names, in a folder or on the hub.
        revision: branch, tag or commit of a data set on the hub; None: the newest.
        text_field: field of a record's text.
        domain_field: field of a record's domain, such as `meta.pile_set_name`; None: one domain for all.
        domains: names of the domains; documents of other domains, or without one, are in the domain "other".
        num_streams: streams; see docs/data.md for a good number.
        shuffle_buffer: documents of a stream that are shuffled together.
        max_document_bytes: maximum size of a document's line, or of its text in Parquet; larger ones cannot be used.
        evaluation_tokens: tokens stored of each domain of the validation split, and of the test split.
        special_tokens: "text": the name of a special token in a text, such as <|im_end|>, is text; "read": it is that token.
    """

    def __init__(
        self,
        path: str,
        data_files: dict[str, str | list[str]] | None = None,
        revision: str | None = None,
        text_field: str = "text",
        domain_field: str | None = None,
        domains: Sequence[str] | None = None,
        num_streams: int = 64,
        shuffle_buffer: int = 1000,
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        evaluation_tokens: int = 1_000_000,
        special_tokens: Literal["text", "read"] = "text",
    ) -> None:
        require(path != "", "path is empty; set it to a folder or to a data set on the Hugging Face hub")
        if (domain_field is None) != (domains is None):
            problem = f"domain_field={domain_field} and domains={domains} belong together"
            raise SettingError(f"{problem}: set the field and the names to tell apart, or neither")
        if domains is not None and (OTHER in domains or len(set(domains)) < len(domains)):
            raise SettingError(f"domains={list(domains)} must be different names, none of them {OTHER!r}")
        self.path = path.removeprefix("file://").rstrip("/") or path
        self.data_files = data_files
        self.revision = revision
        self.fields = Fields(text_field, domain_field, max_bytes=max_document_bytes)
        self.domains = None if domains is None else list(domains)
        self.num_streams = num_streams
        self.shuffle_buffer = shuffle_buffer
        self.evaluation_tokens = evaluation_tokens
        self.special_tokens = special_tokens
        require(max_document_bytes >= 1, f"max_document_bytes={max_document_bytes} must be at least 1")
        require_at_least(1, self, "num_streams", "shuffle_buffer", "evaluation_tokens")

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Fetch the tokenizer, find the files, and cache the tokens to evaluate on."""
        with build_lock(data_dir):
            loaded = self._tokenizer(data_dir, tokenizer)
        folder = self._folder(data_dir, loaded)
        files = find_files(self.path, self.data_files, self.revision)
        with build_lock(data_dir):
            cache_eval_tokens(folder, files, self._config(loaded, []), self.evaluation_tokens)
        cache = open_eval_cache(folder, len(self._names()))
        assert cache is not None
        named = zip(self.domains or [], cache[1]["validation"], strict=False)
        if absent := [name for name, tokens in named if not len(tokens)]:
            problem = f"domains: no validation document that was read is of {', '.join(absent)}"
            rank_zero_warn(f"{problem} by domain_field={self.fields.domain}; correct the names if that is not intended")

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Map the cached tokens; the training files are opened when they are read."""
        loaded = self._tokenizer(data_dir, tokenizer)
        cache = open_eval_cache(self._folder(data_dir, loaded), len(self._names()))
        if cache is None:
            problem = f"path={self.path}: its evaluation tokens for {tokenizer} are not in {data_dir}"
            raise SettingError(f"{problem}; start training, or call prepare_data of the data module")
        files_by_split, tokens = cache
        files = files_by_split["train"]
        config = self._config(loaded, [file.path for file in files])
        facts = [(os.path.basename(file.path), file.bytes, file.contents) for file in files]
        fingerprint: Fingerprint = {"files": f"{len(files)} of {hash_of(facts)}"}
        fingerprint |= {
            "num_streams": self.num_streams,
            "shuffle_buffer": self.shuffle_buffer,
            "fields": str(replace(self.fields, max_bytes=MAX_DOCUMENT_BYTES)),  # its limit changes no sample
            "domains": ", ".join(self._names()),
        }
        if self.special_tokens == "read":
            fingerprint["special_tokens"] = self.special_tokens
        return OpenStreamedText(config.tokenizer, list(config.domains), tokens, fingerprint, config)

    def _tokenizer(self, data_dir: Path, name: str) -> Tokenizer:
        loaded = load_tokenizer(name, data_dir)
        return loaded.reading_special_tokens() if self.special_tokens == "read" else loaded

    def _names(self) -> list[str]:
        return ["text"] if self.domains is None else [*self.domains, OTHER]

    def _config(self, tokenizer: Tokenizer, files: Sequence[str]) -> StreamConfig:
        fields = replace(self.fields, missing_bytes=tokenizer.missing_bytes)
        return StreamConfig(files, fields, self._names(), tokenizer, self.num_streams, self.shuffle_buffer)

    def _folder(self, data_dir: Path, tokenizer: Tokenizer) -> Path:
        settings = (self.path, self.data_files, self.revision, self.fields, self.domains, self.evaluation_tokens)
        reading = ("special_tokens",) if tokenizer.reads_special_tokens else ()
        return data_dir / "streamed" / hash_of((settings, tokenizer.fingerprint, *reading))


@dataclass(frozen=True)
class OpenStreamedText(OpenCorpus):
    """A streamed corpus that can be read; of its training text, `tokens` has a sample."""

    config: StreamConfig

    @override
    def training_source(self, seq_len: int, seed: int) -> TokenSource:
        """Return the windows of all streams in turn, without end."""
        return StreamedSource(self.config, seq_len, seed)
