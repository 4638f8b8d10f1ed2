"""Byte-level BPE tokenizers (`tokenizer_loading.py` reads and trains them).

Every tokenizer here is lossless: text -> ids -> the same text, byte for byte. Losses can then be given in bits per
byte, which do not depend on the tokenizer.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from os.path import commonprefix
from textwrap import shorten
from typing import Any

import numpy as np
import tokenizers

from nlgmoe.data.model_files import TOKENIZER, TokenizerFiles, end_ids
from nlgmoe.validation import RunError, SettingError, require

EOD = "<|endoftext|>"
EOD_NAMES = (EOD, "<eod>", "</s>", "<|end_of_text|>")
COMPARED_TOKENS = 64  # of a document, by `reproduces`
# The byte-level alphabet: printable bytes map to themselves, the others to the characters from 256 on.
_PRINT = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_OF = {chr(byte): byte for byte in sorted(_PRINT)} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - _PRINT))
}
# Pre-tokenisers allowed before ByteLevel: they split a text, and remove nothing unless `behavior` is set to.
CUTTING = ("Split", "Digits", "Punctuation")
PROBE = "  Round trip:\tà la\r\n\n 日本 <|endoftext|> \x00🙂 don't  1234"


class Tokenizer:
    """A lossless tokenizer with an end-of-document token.

    It is accepted by its structure, a byte-level BPE without a normaliser, and by the round trip of a sample. The
    normaliser NFC, which GPT-NeoX's tokenizer has, is removed: text in this form keeps its ids, other text its bytes. A
    vocabulary may lack bytes; a text that has one is refused.

    Args:
        backend: the `tokenizers` object; must be byte-level.
        name: its name in messages.
        files: the files that it is from (`model_files.py`); None: it is not from a file.
        reads_special_tokens: the name of a special token in a text is that token. Otherwise it is text: a document about
            language models contains the string "<|endoftext|>", which must not end the document.

    Attributes:
        eod_id: id of the end-of-document token: a special token of a usual name, else the one that ends a text by the model's
            settings, else a plain entry of a usual name.
        stop_ids: ids that end a generated text: `eod_id`, and those of the model's settings.
        vocab_size: number of ids.
        missing_bytes: bytes that have no token.
        reads_special_tokens: the argument.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        name: str,
        files: TokenizerFiles | None = None,
        reads_special_tokens: bool = False,
    ) -> None:
        backend.encode_special_tokens = not reads_special_tokens
        # Files saved by `transformers` may enable both, which would change documents.
        backend.no_truncation()
        backend.no_padding()
        # Texts are encoded without added tokens here; an exported tokenizer of our own must not add any either.
        if backend.num_special_tokens_to_add(False):
            backend.post_processor = None
        if getattr(backend.model, "dropout", None):  # BPE's random omission of merges
            backend.model.dropout = None
        if [part["type"] for part in parts_of(backend.normalizer, "normalizers")] == ["NFC"]:
            backend.normalizer = None  # it changes only text that it would not reproduce
        self._backend = backend
        self._files = files or {}
        self.reads_special_tokens = reads_special_tokens
        self.name = name
        self._require(foreign_model(backend))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.eod_id, self.stop_ids = self._ends(vocabulary)
        known = backend.get_vocab(with_added_tokens=False)
        self.missing_bytes = bytes(sorted(byte for character, byte in BYTE_OF.items() if character not in known))
        self._require(changing_parts(backend))
        self._require(self._changed_sample())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = not self.reads_special_tokens  # pickle loses it

    def _require(self, problem: str | None) -> None:
        remedy = "Set `tokenizer` to a byte-level BPE without normaliser, prefix space and tokens that strip spaces"
        require(problem is None, f"Tokenizer {self.name!r} does not reproduce every text: {problem}. {remedy}.")

    def _ends(self, vocabulary: dict[str, int]) -> tuple[int, frozenset[int]]:
        """Return the id of the end-of-document token, and all ids that end a generated text."""
        special = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        named = end_ids(self._files, vocabulary)
        candidates = [vocabulary[token] for token in EOD_NAMES if token in special and token in vocabulary]
        candidates += [token for token in named if 0 <= token < self.vocab_size]
        candidates += [vocabulary[token] for token in EOD_NAMES if token in vocabulary]
        problem = f"Tokenizer {self.name!r} has no end-of-document token, one of {', '.join(EOD_NAMES)}"
        remedy = "Add one to its tokenizer.json, or an eos_token_id to generation_config.json beside it."
        require(candidates != [], f"{problem}. {remedy}")
        return candidates[0], frozenset([candidates[0], *named])

    def _changed_sample(self) -> str | None:
        """Encode and decode a text with the names of all added tokens; describe the first change, or return None."""
        added = [f" a {token.content} b" for token in self._backend.get_added_tokens_decoder().values()]
        sample = "".join([PROBE, string.printable, *added])
        text = "".join(character for character in sample if not byte_without_token(character, self.missing_bytes))
        ids = self.encode(text)
        decoded = self.decode(ids)
        if decoded != text:
            begin = max(0, len(commonprefix([text, decoded])) - 10)  # noqa: RUF071 (characters are meant)
            return f"{text[begin : begin + 60]!r} came back as {decoded[begin : begin + 60]!r}"
        if self.reads_special_tokens:
            return None
        if not ids or int(self.token_bytes[ids].sum()) != len(text.encode()) or self.eod_id in ids:
            return "its tokens are not those of the byte-level alphabet"
        return None

    def reading_special_tokens(self) -> Tokenizer:
        """Return the same tokenizer, for which the name of a special token in a text is that token."""
        return Tokenizer(tokenizers.Tokenizer.from_str(self._backend.to_str()), self.name, self.files, True)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without end-of-document token."""
        self.check(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def closed(self, ids: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
        """Return a document's ids, closed by the end-of-document token; a text that ends with it is closed already."""
        return ids if len(ids) and ids[-1] == self.eod_id else [*ids, self.eod_id]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, in parallel threads; see `encode`."""
        for text in texts if self.missing_bytes else ():
            self.check(text)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def check(self, text: str) -> None:
        """Check that a text is Unicode, and that each of its bytes has a token."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python reads such characters of other encodings, with LANG=C for example
            raise SettingError(f"the text {shorten(text, 40)!a} is not UTF-8; convert it") from error
        if problem := byte_without_token(text, self.missing_bytes):
            place = f"the text {shorten(text, 40)!r} has {problem} in tokenizer {self.name}"
            raise SettingError(f"{place}; remove that character, or use another tokenizer")

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, the end-of-document token written out."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def spell(self, token: int) -> bytes:
        """Return the bytes of text of a token; none for the end-of-document token and unknown ids."""
        return self.spellings[token] if token < len(self.spellings) else b""

    def reproduces(self, ids: np.ndarray) -> bool:
        """Return whether the first token ids of a document are reproduced when their text is tokenised again.

        This tokenizer's own nearly always are. Special tokens do not count: they may have been read in the text.
        """
        added = self._backend.get_added_tokens_decoder()
        special = {self.eod_id, *(index for index, token in added.items() if token.special)}
        compared = [token for token in ids[:COMPARED_TOKENS].tolist() if token not in special]
        if min(compared, default=0) < 0 or max(compared, default=0) >= self.vocab_size:
            return False
        sure = COMPARED_TOKENS * 3 // 4  # the last ones depend on those behind them
        return self.encode(self.decode(compared))[:sure] == compared[:sure]

    def check_documents(self, documents: Sequence[np.ndarray], place: str) -> None:
        """Check that at least half of the documents' ids, each [N], are reproduced."""
        if (same := sum(map(self.reproduces, documents))) < len(documents) / 2:
            share = (
                f"{same} of {len(documents)} sampled documents come back when their text is tokenised with {self.name}"
            )
            problem = f"{place} holds another tokenizer's ids: {share}"
            raise RunError(f"{problem}; set data.tokenizer to the one they were made with")

    def has_same_ids(self, other: Tokenizer) -> bool:
        """Return whether each token id has the same bytes of text in both."""
        return (self.eod_id, self.spellings) == (other.eod_id, other.spellings)

    @property
    def files(self) -> TokenizerFiles:
        """The files that it is from, unchanged; one from no file has `tokenizer.json` alone."""
        return self._files if TOKENIZER in self._files else {TOKENIZER: self._backend.to_str()} | self._files

    @classmethod
    def from_files(cls, files: TokenizerFiles, name: str) -> Tokenizer:
        """Undo `files`; `name` is for messages."""
        return cls(tokenizers.Tokenizer.from_str(files[TOKENIZER]), name, files)

    def describe(self) -> str:
        """Return name, size and the beginning of the fingerprint."""
        return f"{self.name}, {self.vocab_size:,} tokens, fingerprint {self.fingerprint[:12]}"

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of bytes of text of each token, int64 [vocab_size]; 0 for the end-of-document token."""
        return np.array([len(spelling) for spelling in self.spellings], dtype=np.int64)

    @cached_property
    def spellings(self) -> list[bytes]:
        """Bytes of text of each token, [vocab_size]; none for the end-of-document token."""
        spelt = [b""] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            if BYTE_OF.keys() >= set(token):
                spelt[index] = bytes(BYTE_OF[character] for character in token)
        for index, added in self._backend.get_added_tokens_decoder().items():
            spelt[index] = added.content.encode()
        spelt[self.eod_id] = b""
        return spelt

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of its JSON: tokenizers with equal fingerprints give equal ids."""
        description = json.loads(self._backend.to_str())
        for setting in ("version", "truncation", "padding", "post_processor"):
            description.pop(setting, None)  # without effect on the ids used here
        if (end := self.decode([self.eod_id])) not in EOD_NAMES:  # of the model's settings
            description["end_of_document"] = end
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


class StreamingDetokenizer:
    """Decodes tokens one at a time and returns only complete characters; a token that ends a text has none.

    Invalid UTF-8 becomes U+FFFD; a character that is incomplete at the end is discarded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the characters that `token` completes."""
        ends = token in self._tokenizer.stop_ids
        return self._decoder.decode(b"" if ends else self._tokenizer.spell(token))


def detokenize(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """Decode a whole sequence."""
    return "".join(map(StreamingDetokenizer(tokenizer).add, tokens))


def foreign_model(backend: tokenizers.Tokenizer) -> str | None:
    """Describe a model other than a byte-level BPE; None if it may be one, which the round trip of a sample shows."""
    kind = type(backend.model).__name__
    if kind == "BPE":
        return "it is a BPE model with byte_fallback, as SentencePiece's" if backend.model.byte_fallback else None
    return f"it is a {kind} model"


def changing_parts(backend: tokenizers.Tokenizer) -> str | None:
    """Describe the normalisers and pre-tokenisers that do not keep every text; None if there is none."""
    normalizers = parts_of(backend.normalizer, "normalizers")
    *cuts, last = parts_of(backend.pre_tokenizer, "pretokenizers") or [{"type": "no pre-tokeniser"}]
    if last["type"] == "ByteLevel" and last["add_prefix_space"]:
        last["type"] = "ByteLevel with a prefix space"
    # An inverted one, as in conversions from tiktoken, removes the text between the matches, which should be empty.
    keeping = [part for part in cuts if part.get("behavior") != "Removed" or part.get("invert")]
    removing = [part for part in cuts if part["type"] not in CUTTING or part not in keeping]
    wrong = [part["type"] for part in [*normalizers, *removing, last] if part["type"] != "ByteLevel"]
    return f"it has {', '.join(wrong)}" if wrong else None


def parts_of(component: Any, name: str) -> list[dict[str, Any]]:
    """Return the settings of a tokenizer's component; of a sequence, those of each part in its list `name`."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    parts: list[dict[str, Any]] = settings.get(name, [settings])
    return parts


def byte_without_token(text: str, missing: bytes) -> str | None:
    """Describe the first of the `missing` bytes in a text; None if it has none of them."""
    content = text.encode() if missing else b""
    if len(content.translate(None, missing)) == len(content):
        return None
    place = next(place for place, byte in enumerate(content) if byte in missing)
    return f"a byte without a token (0x{content[place]:02X}, at byte {place:,} of the text)"
