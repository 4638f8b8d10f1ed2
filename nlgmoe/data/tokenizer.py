"""Byte-level BPE tokenizers: GPT-2's, two small ones trained on the pocket Pile, or a folder of the user's.

Every tokenizer here is lossless: text -> ids -> the same text, byte for byte. Losses can then be given in bits per
byte, which do not depend on the tokenizer.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nlgmoe.files import require_regular
from nlgmoe.validation import RunError, SettingError

EOD = "<|endoftext|>"
EOD_NAMES = (EOD, "<eod>", "</s>", "<|end_of_text|>")
BUILT = ("gpt2", "pocket-1k", "pocket-4k", "pocket-8k")  # by `pocket/tokenizers.py`
COMPARED_TOKENS = 512  # of a document, by `share_reproduced`
SAME_TOKENIZER = 0.9  # least share that a tokenizer reproduces of its own ids
# The byte-level alphabet: bytes that print stand for themselves, the others for the characters from 256 on.
_PRINT = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_OF = {chr(byte): byte for byte in sorted(_PRINT)} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - _PRINT))
}
PROBE = "  Round trip:\tà la\r\n\n 日本 <|endoftext|> \x00🙂 don't  1234"
# The last: nearly every character of two bytes, and one of each first byte of three and four that is in use.
_OTHERS = [*range(0x1000, 0xD800, 0x1000), 0xFB01, 0x10000]
PROBES = (PROBE, "no space before", "".join(filter(str.isprintable, map(chr, [*range(0x801), *_OTHERS]))))


class Tokenizer:
    """A lossless tokenizer with an end-of-document token.

    The normaliser NFC, which GPT-NeoX's tokenizer has, is removed: text in this form keeps its ids, other text its bytes.

    Args:
        backend: the `tokenizers` object that does the work; must be byte-level.
        name: the user's name of it, for messages.

    Raises:
        ValueError: it has no end-of-document token, or does not reproduce its input.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str) -> None:
        # A document about language models contains the string "<|endoftext|>"; it must not end the document.
        backend.encode_special_tokens = True
        # Files written after a use in `transformers` may have these, which would cut documents off.
        backend.no_truncation()
        backend.no_padding()
        # No token is added to a text here, so none by an exported tokenizer either.
        if backend.num_special_tokens_to_add(False):
            backend.post_processor = None
        if getattr(backend.model, "dropout", None):  # of BPE: merges left out at random
            backend.model.dropout = None
        self._removed_normalizer: Any = None
        if [part["type"] for part in _parts(backend.normalizer, "normalizers")] == ["NFC"]:
            self._removed_normalizer = json.loads(backend.normalizer.__getstate__())
            backend.normalizer = None  # it changes only text that it would not reproduce
        self._backend = backend
        self.name = name
        vocabulary = backend.get_vocab(with_added_tokens=True)
        end_tokens = [token for token in EOD_NAMES if token in vocabulary]
        if not end_tokens:
            raise SettingError(
                f"Tokenizer {name!r} has no end-of-document token, one of {', '.join(EOD_NAMES)}. "
                "Add one to its tokenizer.json, or set `tokenizer` to another."
            )
        self.eod_id: int = vocabulary[end_tokens[0]]
        self.vocab_size: int = max(vocabulary.values()) + 1
        added = (f"a {token.content} b" for token in backend.get_added_tokens_decoder().values())
        problems = [
            f"{text!r} came back as {decoded!r}"
            for text, decoded in map(self._find_difference, (*PROBES, *added))
            if text
        ]
        if changing := _changes_texts(backend):  # no sample shows what each of them changes
            problems = [f"it has {', '.join(changing)}"]
        if problems:
            raise SettingError(
                f"Tokenizer {name!r} does not reproduce every text: {problems[0]}. "
                "Set `tokenizer` to a byte-level BPE without normaliser, prefix space and added tokens that strip spaces, "
                "whose end-of-document token is special."
            )

    def _find_difference(self, text: str) -> tuple[str, str]:
        """Return where a text and the decoding of its ids differ, a piece of each; empty pieces if the text is reproduced."""
        ids = self.encode(text)
        decoded = self.decode(ids)
        # Tokens that are not byte-level have other lengths than in `token_bytes`.
        if decoded == text and int(self.token_bytes[ids].sum()) == len(text.encode()) and self.eod_id not in ids:
            return "", ""
        begin = max(0, len(commonprefix([text, decoded])) - 10) if decoded != text else 0  # noqa: RUF071 (characters are meant)
        return text[begin : begin + 60], decoded[begin : begin + 60]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without end-of-document token."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel threads."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, the end-of-document token written out."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def spell(self, token: int) -> bytes:
        """Return the bytes of text that a token stands for; the end of a document, and an unknown id, for none."""
        return self.spellings[token] if token < len(self.spellings) else b""

    def share_reproduced(self, documents: Iterable[np.ndarray]) -> float:
        """Return the share of ids that come back when their text is tokenised again: near 1 for this tokenizer's own ids.

        Runs of three ids are counted, as single ones of a small vocabulary often come back from a large one. Cut documents
        lose a few; one with ids outside the vocabulary loses all.
        """
        kept = total = 0
        for document in documents:
            ids = [int(token) for token in document[:COMPARED_TOKENS] if token != self.eod_id]
            runs = Counter(zip(ids, ids[1:], ids[2:], strict=False))
            total += runs.total()
            if runs and min(ids) >= 0 and max(ids) < self.vocab_size:
                reproduced = self.encode(self.decode(ids))
                kept += (runs & Counter(zip(reproduced, reproduced[1:], reproduced[2:], strict=False))).total()
        return kept / total if total else 1.0

    def has_same_ids(self, other: "Tokenizer") -> bool:
        """Return whether each token id stands for the same bytes of text in both."""
        return (self.eod_id, self.spellings) == (other.eod_id, other.spellings)

    def to_json(self) -> str:
        """Return the tokenizer in the format of the `tokenizers` library."""
        text: str = self._backend.to_str()
        return text

    @classmethod
    def from_json(cls, text: str, name: str) -> "Tokenizer":
        """Undo `to_json`; `name` is for messages."""
        return cls(tokenizers.Tokenizer.from_str(text), name)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: how many bytes of text each token stands for; the end of a document is none."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # the byte-level alphabet has one character a byte
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = len(added.content.encode())
        lengths[self.eod_id] = 0
        return lengths

    @cached_property
    def spellings(self) -> list[bytes]:
        """[vocab_size] the bytes of text that each token stands for; the end of a document is none."""
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
        """sha256 of its JSON, hexadecimal: two tokenizers with the same one give the same ids."""
        description = json.loads(self._backend.to_str())
        if self._removed_normalizer is not None:  # earlier versions kept it
            description["normalizer"] = self._removed_normalizer
        for setting in ("version", "truncation", "padding", "post_processor"):
            description.pop(setting, None)  # without effect on the ids used here
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """Return the settings of a tokenizer's component; of a sequence, those of each part in its list `name`."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    parts: list[dict[str, Any]] = settings.get(name, [settings])
    return parts


def _changes_texts(backend: tokenizers.Tokenizer) -> list[str]:
    """Return the types of a tokenizer's normalisers, and of its pre-tokenisers that remove what they match."""
    splitters = _parts(backend.pre_tokenizer, "pretokenizers")
    # An inverted one, as in conversions from tiktoken, removes the text between the matches, which may be empty.
    removals = [part for part in splitters if part.get("behavior") == "Removed" and not part.get("invert")]
    removals += [part for part in splitters if part["type"] == "CharDelimiterSplit"]
    return [part["type"] for part in [*_parts(backend.normalizer, "normalizers"), *removals]]


def load_tokenizer(name_or_path: str, data_dir: Path) -> Tokenizer:
    """Load a tokenizer, after downloading or training it where that is needed.

    Args:
        name_or_path: "gpt2", "pocket-1k", "pocket-4k", "pocket-8k", or a folder with `tokenizer.json` or with `vocab.json` and
            `merges.txt`.
        data_dir: where tokenizers are kept (`tokenizers/NAME`), and the pocket Pile that pocket ones are trained on.

    Raises:
        ValueError: neither a known name nor such a folder, or not usable.
    """
    folder = Path(name_or_path)
    if name_or_path in BUILT:
        from nlgmoe.data.pocket.tokenizers import build_tokenizer  # no other tokenizer needs it

        folder = build_tokenizer(name_or_path, data_dir)
    if (folder / "tokenizer.json").exists():
        return _load(name_or_path, folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _load(name_or_path, folder / "vocab.json", folder / "merges.txt")
    raise SettingError(
        f"Unknown tokenizer {name_or_path!r}: set `tokenizer` to {', '.join(BUILT)}, or to a "
        "folder with tokenizer.json or with vocab.json and merges.txt."
    )


def _load(name: str, *files: Path) -> Tokenizer:
    """Load a tokenizer.json, or vocabulary and merges; unchanged files are loaded once.

    GPT-2's takes a second, and each part of a blend loads it.
    """
    for file in files:
        require_regular(file, "replace it")
    return _load_version(name, tuple((file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)
def _load_version(name: str, versions: tuple[tuple[Path, int, int], ...]) -> Tokenizer:
    files = [file for file, _, _ in versions]
    try:
        backend = tokenizers.Tokenizer.from_file(str(files[0])) if len(files) == 1 else _from_vocabulary(*files)
    except BaseException as error:  # the library raises `Exception` itself, or Rust's panic, and does not name the file
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        names = " or ".join(map(str, files))
        raise RunError(f"{names} is damaged or not a tokenizer ({error}); replace it") from error
    return Tokenizer(backend, name)


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenisation; `vocab_size` includes the 256 bytes and `EOD` (id 0)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _from_vocabulary(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's file pair. Its end-of-document token is a plain entry that no merge produces, so text never gives it."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
