import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from nlgmoe.data.tokenizer import (
    BYTE_OF,
    EOD,
    SAME_TOKENIZER,
    Tokenizer,
    load_tokenizer,
    train_byte_level_bpe,
    train_tokenizer,
)
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


@pytest.mark.parametrize("text", [EOD, f"a{EOD}b", f" {EOD}\n{EOD}", "<|endoftext|"])
def test_special_token_in_a_document_is_plain_text(text: str) -> None:
    for ids in (SMALL.encode(text), SMALL.encode_batch([text])[0]):
        assert SMALL.eod_id not in ids
        assert SMALL.decode(ids) == text
    assert SMALL.decode([SMALL.eod_id]) == EOD and SMALL.token_bytes[SMALL.eod_id] == 0


def test_training_is_reproducible() -> None:
    assert small().fingerprint == SMALL.fingerprint
    other = train_byte_level_bpe(iter(["something else entirely"] * 9), 300)
    assert Tokenizer(other, "other").fingerprint != SMALL.fingerprint


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


def test_a_tokenizer_that_others_read_adds_no_token_either() -> None:
    """As many published ones, it would begin every text with a special token."""
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    backend.post_processor = processors.TemplateProcessing(single=f"{EOD} $A", special_tokens=[(EOD, 0)])
    tokenizer = Tokenizer(backend, "begins texts")
    assert tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("lowest").ids == tokenizer.encode("lowest")


def test_dropout_is_off() -> None:
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    plain = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), "plain")
    backend.model.dropout = 0.9
    random = Tokenizer(backend, "random")
    assert random.encode("low lowest") == plain.encode("low lowest") and random.fingerprint == plain.fingerprint


@pytest.mark.parametrize(("content", "settings"), [("<sep>", {"lstrip": True}), ("</s>", {"special": False})])
def test_added_tokens_that_change_text_are_refused(content: str, settings: dict[str, bool]) -> None:
    """Text would lose its spaces, or end a document where it strikes something out."""
    backend = json.loads(train_byte_level_bpe(iter(["low lower lowest"] * 9), 300).to_str().replace(EOD, "</s>"))
    usual = {"id": 300, "content": "<sep>", "special": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [backend["added_tokens"][0], usual | {"normalized": False}]
    backend["added_tokens"] = [one | settings if one["content"] == content else one for one in added]
    with pytest.raises(ValueError, match="does not reproduce every text: "):
        Tokenizer.from_json(json.dumps(backend), "changes text")


def test_a_tokenizer_reproduces_its_own_ids_and_not_a_smaller_ones() -> None:
    texts = ["low lower lowest", "new newer newest", "slow slower slowest"] * 9
    few, many = (Tokenizer(train_byte_level_bpe(iter(texts), size), "small") for size in (262, 300))
    documents = [np.array([*few.encode(text), few.eod_id]) for text in texts]
    assert few.share_reproduced(documents) == 1
    assert many.share_reproduced(documents) < SAME_TOKENIZER
    assert few.share_reproduced([np.array([*documents[0], 262])]) == 0


def test_files_are_loaded_again_only_if_they_change(tmp_path: Path) -> None:
    first, second = (train_byte_level_bpe(iter([text] * 9), 300) for text in ("low lower lowest", "new newer newest"))
    first.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path), tmp_path)
    assert load_tokenizer(str(tmp_path), tmp_path) is loaded
    second.save(str(tmp_path / "tokenizer.json"))
    assert (
        load_tokenizer(str(tmp_path), tmp_path).fingerprint
        == Tokenizer(second, "new").fingerprint
        != loaded.fingerprint
    )


WITHOUT_Q = [EOD, *sorted({*BYTE_OF} - {"Q"})]
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def rest(pattern: object, behavior: str, invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior, invert), LEVEL])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", normalizers.Lowercase(), "it has Lowercase"),
        ("normalizer", normalizers.NFKC(), "it has NFKC"),
        (
            "normalizer",
            normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),
            "it has NFC, Strip",
        ),
        ("normalizer", normalizers.Replace("``", '"'), "it has Replace"),
        ("pre_tokenizer", rest("<br>", "removed"), "it has Split"),
        (
            "pre_tokenizer",
            rest(Regex("[^q]+"), "removed", invert=True),
            "'ghijklmnopqrst.*' came back as 'ghijklmnoprst",
        ),
        (
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.CharDelimiterSplit("▁"), LEVEL]),
            "it has CharDelimiterSplit",
        ),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "it has ByteLevel with a prefix space"),
        (
            "model",
            models.BPE({token: n for n, token in enumerate([EOD, *sorted({*BYTE_OF} - {"Q"})])}, []),
            "it has no token for 1 of the 256 bytes",
        ),
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


@pytest.mark.parametrize(
    "value",
    [rest(Regex("z+"), "isolated"), rest(Regex(r"\w+|\W+"), "removed", invert=True)],
    ids=["isolated", "tiktoken"],
)
def test_a_pattern_that_keeps_every_text_is_none_that_removes(value: pre_tokenizers.PreTokenizer) -> None:
    """Conversions of tiktoken's tokenizers remove what lies between the matches, which is nothing."""
    backend = train_byte_level_bpe(iter(["low lower lowest"] * 9), 300)
    backend.pre_tokenizer = value
    assert Tokenizer(backend, "keeps all").decode(Tokenizer(backend, "keeps all").encode("Quick, QZ")) == "Quick, QZ"


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.Sequence([normalizers.NFC()])], ids=str)
def test_the_normaliser_of_composed_characters_is_left_out(normalizer: normalizers.Normalizer) -> None:
    """GPT-NeoX's has it. Bytes per token are those of the text, in whichever form it is."""
    plain, backend = (train_byte_level_bpe(iter(["th\u00e9 th\u00e9"] * 9), 300) for _ in range(2))
    backend.normalizer = normalizer
    with_it = json.loads(backend.to_str())
    tokenizer = Tokenizer(backend, "composes")
    apart = "the\u0301"
    ids = tokenizer.encode(apart)
    assert tokenizer.decode(ids) == apart and tokenizer.token_bytes[ids].sum() == len(apart.encode())
    assert tokenizer.encode("th\u00e9") == plain.encode("th\u00e9").ids
    exported = Tokenizer.from_json(tokenizer.to_json(), "exported")
    assert exported.encode(apart) == ids and exported.has_same_ids(tokenizer)
    for setting in ("version", "truncation", "padding", "post_processor"):
        with_it.pop(setting)
    assert tokenizer.fingerprint == hashlib.sha256(json.dumps(with_it, sort_keys=True).encode()).hexdigest()


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
