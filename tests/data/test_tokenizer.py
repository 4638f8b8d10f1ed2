import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

from nlgmoe.data.tokenizer import BYTE_OF, EOD, Tokenizer
from nlgmoe.data.tokenizer_loading import load_tokenizer, train_byte_level_bpe, train_tokenizer
from nlgmoe.experiment import parse_config
from nlgmoe.validation import SettingError
from tests.support.corpora import small

SMALL = small()


@given(st.text())
def test_tokenizer_round_trip_and_token_bytes(text: str) -> None:
    ids = SMALL.encode(text)
    assert SMALL.decode(ids) == text
    assert int(SMALL.token_bytes[ids].sum()) == len(text.encode())
    assert SMALL.encode_batch([text, "", text]) == [ids, [], ids]


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(SettingError, match=r"the text 'na\\udcefve' is not UTF-8; convert it"):
        SMALL.encode(b"na\xefve".decode("utf-8", "surrogateescape"))


def test_tokenizer_folder_is_read_in_both_layouts(tmp_path: Path) -> None:
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    backend.save(str(tmp_path / "one" / "tokenizer.json"))
    backend.model.save(str(tmp_path / "two"))
    one, two = (load_tokenizer(str(tmp_path / name), tmp_path) for name in ("one", "two"))
    assert one.encode("lowest low") == two.encode("lowest low") and one.eod_id == two.eod_id
    assert one.vocab_size == two.vocab_size == len(json.loads((tmp_path / "two" / "vocab.json").read_text()))


def test_tokenizer_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    settings = json.loads(train_byte_level_bpe(iter(["low lower lowest"] * 9), 300).to_str())
    settings["model"]["continuing_subword_prefix"] = "##"  # that no merge has: the library panics
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged or not a tokenizer \(.*; replace it$"):
        load_tokenizer(str(tmp_path), tmp_path)


def test_dropout_and_added_tokens_of_published_files_are_off() -> None:
    """They would draw other ids each time, and begin every text with a special token, here or where others read it."""
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    plain = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), "plain")
    backend.model.dropout = 0.9
    backend.post_processor = processors.TemplateProcessing(single=f"{EOD} $A", special_tokens=[(EOD, 0)])
    published = Tokenizer(backend, "published")
    assert published.encode("low lowest") == plain.encode("low lowest") and published.fingerprint == plain.fingerprint
    others = tokenizers.Tokenizer.from_str(published.files["tokenizer.json"])
    assert others.encode("low lowest").ids == plain.encode("low lowest")


@pytest.mark.parametrize(("content", "settings"), [("<sep>", {"lstrip": True}), ("</s>", {"special": False})])
def test_added_tokens_that_change_text_are_refused(content: str, settings: dict[str, bool]) -> None:
    """Text would lose its spaces, or end a document where it strikes something out."""
    backend = json.loads(train_byte_level_bpe(iter(["low lower lowest"] * 9), 300).to_str().replace(EOD, "</s>"))
    usual = {"id": 300, "content": "<sep>", "special": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [backend["added_tokens"][0], usual | {"normalized": False}]
    backend["added_tokens"] = [one | settings if one["content"] == content else one for one in added]
    with pytest.raises(ValueError, match="does not reproduce every text: "):
        Tokenizer.from_files({"tokenizer.json": json.dumps(backend)}, "changes text")


CHARACTERS = {token: n for n, token in enumerate([EOD, *sorted(BYTE_OF)])}


def without(pattern: object, invert: bool = False) -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer that removes what matches the pattern, or does not."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "removed", invert), level])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]), "it has NFC, Strip"),
        ("pre_tokenizer", without(Regex("[^q]+"), invert=True), "'ghijklmnopqrst.*' came back as 'ghijklmnoprst"),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "it has ByteLevel with a prefix space"),
        ("model", models.Unigram([("a", 0.0)], byte_fallback=True), "it is a Unigram model"),
        ("model", models.BPE(CHARACTERS, [], byte_fallback=True), "it is a BPE model with byte_fallback"),
        ("model", models.BPE({EOD: 0, "ab": 1}, []), "its tokens are not those of the byte-level alphabet"),
    ],
    ids=str,
)
def test_a_tokenizer_that_changes_texts_is_refused(part: str, value: object, message: str) -> None:
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    if part == "pre_tokenizer":  # as older files have it: this token needs no look at the text around it
        backend = tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))
    setattr(backend, part, value)
    with pytest.raises(ValueError, match=f"does not reproduce every text: .*{message}"):
        Tokenizer(backend, "changes texts")


def test_tokenizer_pattern_that_keeps_every_text_is_taken() -> None:
    """Conversions of tiktoken's tokenizers remove what lies between the matches, which is nothing."""
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    backend.pre_tokenizer = without(Regex(r"\w+|\W+"), invert=True)
    tokenizer = Tokenizer(backend, "keeps all")
    assert tokenizer.decode(tokenizer.encode("Quick, QZ")) == "Quick, QZ"


def test_the_normaliser_of_composed_characters_is_left_out() -> None:
    """GPT-NeoX's has it. Bytes per token are those of the text, in whichever form it is."""
    plain, backend = (train_byte_level_bpe(iter(["th\u00e9 th\u00e9"] * 9), 300) for _ in range(2))
    backend.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(backend, "composes")
    apart = "the\u0301"
    ids = tokenizer.encode(apart)
    assert tokenizer.decode(ids) == apart and tokenizer.token_bytes[ids].sum() == len(apart.encode())
    assert tokenizer.encode("th\u00e9") == plain.encode("th\u00e9").ids
    exported = Tokenizer.from_files(tokenizer.files, "exported")
    assert exported.encode(apart) == ids and exported.has_same_ids(tokenizer)
    assert exported.fingerprint == tokenizer.fingerprint


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no end-of-document token"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), "empty")
    with pytest.raises(ValueError, match="set `tokenizer` to gpt2"):
        load_tokenizer("gpt-2", tmp_path)


def test_vocabulary_of_the_model_is_the_tokenizers_unless_it_is_set(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    size = train_tokenizer(iter(["low lower lowest"] * 9), 300, folder).vocab_size
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

    def vocab_size(**settings: Any) -> int:
        return int(parse_config(quickstart, **settings)["model"]["config"]["vocab_size"])

    assert 256 < vocab_size(data__tokenizer=str(folder)) == size <= 300
    assert vocab_size() == 4096 and vocab_size(data__tokenizer="gpt2", data__data_dir=str(tmp_path)) == 50257
    assert vocab_size(data__tokenizer=str(folder), model__config__vocab_size=512) == 512
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]  # nothing is downloaded for a number


# Of the published tokenizer.json files: normaliser, cuts before ByteLevel, whether ByteLevel cuts by GPT-2's pattern, settings of
# BPE, post-processor, the special tokens, and the end of a text by generation_config.json.
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = GPT4.replace("{1,3}", "")
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def begins_with(token: str) -> dict[str, Any]:
    """Llama 3's and DeepSeek V3's: transformers begins each text with this token."""
    text = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": text, "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}]} | {
        "special_tokens": {token: {"id": token, "ids": [0], "tokens": [token]}}
    }


NFC, EMPTY = {"type": "NFC"}, {"type": "Sequence", "normalizers": []}
DIGITS = {"type": "Digits", "individual_digits": True}
PUBLISHED: dict[str, tuple[Any, list[Any], dict[str, Any], Any, list[str], list[str]]] = {
    "Qwen2": (NFC, [split(QWEN)], {}, None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|im_end|>", "<|endoftext|>"]),
    "Llama 3": (
        None, [split(GPT4)], {"ignore_merges": True}, begins_with("<|begin_of_text|>"),
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "SmolLM2": (None, [DIGITS], {}, None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
    "DeepSeek V3": (
        EMPTY, [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK)], {},
        begins_with("<｜begin▁of▁sentence｜>"), ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"],
        ["<｜end▁of▁sentence｜>"],
    ),
}  # fmt: skip
TEXT = "It's 12345 o'clock:\tthe king and the QUEEN's\r\n\n  日本語 über naïve def f(x): return x / 2 <br> 🙂 "


@pytest.fixture
def published(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a small tokenizer of a published family's form, and settings of generation."""
    normalizer, cuts, bpe, post_processor, special, ends = PUBLISHED[request.param]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cuts == [DIGITS]}
    form = {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]}}
    form |= {"decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}
    empty = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    backend = tokenizers.Tokenizer.from_str(json.dumps(empty | form))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 9, trainer)
    saved = json.loads(backend.to_str()) | {"post_processor": post_processor}
    saved["model"] |= bpe
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    ids = [backend.token_to_id(token) for token in ends]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids if len(ids) > 1 else ids[0]}))
    return tmp_path


@pytest.mark.parametrize("published", PUBLISHED, indirect=True)
def test_tokenizers_of_published_models_are_taken(published: Path, request: pytest.FixtureRequest) -> None:
    """Their ids are those that `transformers` gives, their special tokens are text unless they are to be read."""
    special, ends = PUBLISHED[request.node.callspec.params["published"]][-2:]
    tokenizer = load_tokenizer(str(published), published)
    plain = tokenizers.Tokenizer.from_file(str(published / "tokenizer.json"))
    ids = tokenizer.encode(TEXT)
    assert ids == plain.encode(TEXT, add_special_tokens=False).ids and len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT and tokenizer.token_bytes[ids].sum() == len(TEXT.encode())
    named = f"a{ends[0]} b" + "".join(special)
    assert tokenizer.encode_batch([named]) == [tokenizer.encode(named)] == [deepcopy(tokenizer).encode(named)]
    assert tokenizer.token_bytes[tokenizer.eod_id] == 0
    as_text, read = tokenizer.encode(named), tokenizer.reading_special_tokens().encode(named)
    assert tokenizer.decode(as_text) == tokenizer.decode(read) == named and tokenizer.eod_id not in as_text
    assert read == plain.encode(named, add_special_tokens=False).ids and len(read) <= 4 + len(special)
    assert tokenizer.stop_ids == {plain.token_to_id(token) for token in {*ends, tokenizer.decode([tokenizer.eod_id])}}
    assert tokenizer.decode([tokenizer.eod_id]) in ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
    assert all(tokenizer.reproduces(np.array(ids)) for ids in (as_text, [*read, tokenizer.eod_id]))
    assert tokenizer.files["tokenizer.json"] == (published / "tokenizer.json").read_text(encoding="utf-8")
    again = Tokenizer.from_files(tokenizer.files, "again")
    assert (again.fingerprint, again.stop_ids) == (tokenizer.fingerprint, tokenizer.stop_ids)


def test_byte_without_a_token_is_refused_only_in_a_text_that_has_it() -> None:
    """SmolLM2's lacks 21 bytes, among them control characters."""
    kept = {token: number for number, token in enumerate([EOD, *sorted({*BYTE_OF} - {"Q", "ú"})])}
    backend = tokenizers.Tokenizer.from_str(SMALL.files["tokenizer.json"])
    backend.model = models.BPE(kept, [])
    tokenizer = Tokenizer(backend, "lacks two")
    assert tokenizer.missing_bytes == b"Q\xfa"  # no text has the second
    assert tokenizer.decode(tokenizer.encode("the king")) == "the king"
    message = r"'the Queen' has a byte without a token \(0x51, at byte 4 of the text\) in tokenizer lacks two; "
    for refused in (lambda: tokenizer.encode("the Queen"), lambda: tokenizer.encode_batch(["the king", "the Queen"])):
        with pytest.raises(SettingError, match=message):
            refused()


def test_end_of_document_token_is_named_by_the_models_settings() -> None:
    """A plain entry of a usual name does not count: documents have it as text."""
    text = json.dumps(json.loads(SMALL.files["tokenizer.json"].replace(EOD, "<end>")))
    entry = tokenizers.Tokenizer.from_str(text).token_to_id("Ġlowest" if "Ġlowest" in text else "lo")
    for name, settings in (
        ("generation_config.json", {"eos_token_id": [0, entry]}),
        ("config.json", {"eos_token_id": 0}),
        ("tokenizer_config.json", {"eos_token": {"content": "<end>"}}),
        ("special_tokens_map.json", {"eos_token": "<end>"}),
    ):
        tokenizer = Tokenizer.from_files({"tokenizer.json": text, name: json.dumps(settings)}, name)
        assert (tokenizer.eod_id, 0 in tokenizer.stop_ids) == (0, True)
        assert tokenizer.fingerprint != SMALL.fingerprint
        assert (entry in tokenizer.stop_ids) == (name == "generation_config.json")
    with pytest.raises(ValueError, match="has no end-of-document token"):
        Tokenizer.from_files({"tokenizer.json": text}, "unnamed")
