"""The byte-level alphabet, and the parts of a tokenizer that keep every text."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

# Printable bytes map to themselves, the others to the characters from 256 on.
_PRINT = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_OF = {chr(byte): byte for byte in sorted(_PRINT)} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - _PRINT))
}
# Pre-tokenisers allowed before ByteLevel: they split a text, and remove nothing unless `behavior` is set to.
CUTTING = ("Split", "Digits", "Punctuation")


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
    removing = [
        part
        for part in cuts
        if part["type"] not in CUTTING or (part.get("behavior") == "Removed" and not part.get("invert"))
    ]
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
