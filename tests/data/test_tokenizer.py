import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from nlgmoe.data.tokenizer import BYTE_OF, EOD, Tokenizer, load_tokenizer, train_byte_level_bpe, train_tokenizer
from nlgmoe.experiment import parse_config


def small() -> Tokenizer:
    return Tokenizer(train_byte_level_bpe(iter(["low lower lowest", "new newer newest"] * 9), 300), "small")


SMALL = small()


@given(st.text())
def test_round_trip_and_token_bytes(text: str) -> None:
    ids = SMALL.encode(text)
    assert SMALL.decode(ids) == text
    assert int(SMALL.token_bytes[ids].sum()) == len(text.encode())
    assert SMALL.encode_batch([text, "", text]) == [ids, [], ids]


def test_special_token_in_a_document_is_plain_text() -> None:
    text = f"a{EOD}b {EOD}\n{EOD}"
    for ids in (SMALL.encode(text), SMALL.encode_batch([text])[0]):
        assert SMALL.eod_id not in ids and SMALL.decode(ids) == text
    assert SMALL.decode([SMALL.eod_id]) == EOD and SMALL.token_bytes[SMALL.eod_id] == 0


def test_folder_in_both_layouts(tmp_path: Path) -> None:
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    backend.save(str(tmp_path / "one" / "tokenizer.json"))
    backend.model.save(str(tmp_path / "two"))
    one, two = (load_tokenizer(str(tmp_path / name), tmp_path) for name in ("one", "two"))
    assert one.encode("lowest low") == two.encode("lowest low") and one.eod_id == two.eod_id
    assert one.vocab_size == two.vocab_size == len(json.loads((tmp_path / "two" / "vocab.json").read_text()))


def test_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    backend.model.save(str(tmp_path))
    os.truncate(tmp_path / "vocab.json", 100)
    with pytest.raises(ValueError, match=r"vocab.json or .*merges.txt is damaged or not a tokenizer \(.*; replace it$"):
        load_tokenizer(str(tmp_path), tmp_path)
    settings = json.loads(backend.to_str())
    settings["model"]["continuing_subword_prefix"] = "##"  # that no merge has: the library panics
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged or not a tokenizer"):
        load_tokenizer(str(tmp_path), tmp_path)


def test_dropout_and_added_tokens_of_published_files_are_off() -> None:
    """They would draw other ids each time, and begin every text with a special token, here or where others read it."""
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    plain = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), "plain")
    backend.model.dropout = 0.9
    backend.post_processor = processors.TemplateProcessing(single=f"{EOD} $A", special_tokens=[(EOD, 0)])
    published = Tokenizer(backend, "published")
    assert published.encode("low lowest") == plain.encode("low lowest") and published.fingerprint == plain.fingerprint
    others = tokenizers.Tokenizer.from_str(published.to_json())
    assert others.encode("low lowest").ids == plain.encode("low lowest")


@pytest.mark.parametrize(("content", "settings"), [("<sep>", {"lstrip": True}), ("</s>", {"special": False})])
def test_added_tokens_that_change_text_are_refused(content: str, settings: dict[str, bool]) -> None:
    """Text would lose its spaces, or end a document where it strikes something out."""
    backend = json.loads(train_byte_level_bpe(iter(["low lower lowest"] * 9), 300).to_str().replace(EOD, "</s>"))
    usual = {"id": 300, "content": "<sep>", "special": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [backend["added_tokens"][0], usual | {"normalized": False}]
    backend["added_tokens"] = [one | settings if one["content"] == content else one for one in added]
    with pytest.raises(ValueError, match="does not reproduce every text: "):
        Tokenizer.from_json(json.dumps(backend), "changes text")


WITHOUT_Q = models.BPE({token: n for n, token in enumerate([EOD, *sorted({*BYTE_OF} - {"Q"})])}, [])


def without(pattern: object, invert: bool = False) -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer that removes what matches the pattern, or does not."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "removed", invert), level])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", normalizers.NFKC(), "it has NFKC"),
        ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]), "it has NFC, Strip"),
        ("pre_tokenizer", without("<br>"), "it has Split"),
        ("pre_tokenizer", without(Regex("[^q]+"), invert=True), "'ghijklmnopqrst.*' came back as 'ghijklmnoprst"),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "it has ByteLevel with a prefix space"),
        ("model", WITHOUT_Q, "it has no token for 1 of the 256 bytes"),
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


def test_a_pattern_that_keeps_every_text_is_taken() -> None:
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
    exported = Tokenizer.from_json(tokenizer.to_json(), "exported")
    assert exported.encode(apart) == ids and exported.has_same_ids(tokenizer)
    assert exported.fingerprint == tokenizer.fingerprint


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no end-of-document token"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), "empty")
    with pytest.raises(ValueError, match="set `tokenizer` to gpt2"):
        load_tokenizer("gpt-2", tmp_path)


def test_the_models_vocabulary_is_the_tokenizers_unless_it_is_set(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    size = train_tokenizer(iter(["low lower lowest"] * 9), 300, folder).vocab_size
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

    def vocab_size(**settings: Any) -> int:
        return int(parse_config(quickstart, **settings)["model"]["config"]["vocab_size"])

    assert 256 < vocab_size(data__tokenizer=str(folder)) == size <= 300
    assert vocab_size() == 4096 and vocab_size(data__tokenizer="gpt2", data__data_dir=str(tmp_path)) == 50257
    assert vocab_size(data__tokenizer=str(folder), model__config__vocab_size=512) == 512
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]  # nothing is downloaded for a number
