"""A GGUF file of a real model, cut to 2 MB, and files that cannot be imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from gguf import GGUFWriter

from nlgmoe.checkpoint.portable import load_model
from nlgmoe.tools.hugging_face import gguf_file
from nlgmoe.tools.hugging_face.importing import import_model
from tests.real import CUT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "cut.ckpt"
    import_model(str(CUT), path)
    return path


def test_logits_are_those_of_transformers_to_the_bit(checkpoint: Path) -> None:
    settings = {"dtype": torch.float32, "quantization_config": transformers.GgufConfig(dequantize=True)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(CUT.parent, gguf_file=CUT.name, **settings).eval()
    ours = load_model(checkpoint)
    ids = torch.randint(2000, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours.logits(ours(ids).hidden), expected, rtol=0, atol=0)
    assert ours.config.layer_norm_eps == 1e-5
    assert [path.name for path in checkpoint.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "gpt-2": ["It", "'ll", "\u0120be", "\u012020245"],
        "smollm": ["It", "'ll", "\u0120be", "\u0120", "2", "0", "2", "4", "5"],
        "llama-bpe": ["It", "'ll", "\u0120be", "\u0120", "202", "45"],
    }.items(),
)
def test_pre_tokenizers_split_as_their_models_do(name: str, parts: list[str], tmp_path: Path) -> None:
    """Those that transformers reads, and the one that it does not."""
    renamed = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--pre-tokenizer", name]
    subprocess.run([*renamed, str(CUT), str(tmp_path / "cut.gguf")], check=True)
    import_model(str(tmp_path / "cut.gguf"), tmp_path / "cut.ckpt")
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "cut.ckpt" / "tokenizer.json"))
    assert [part for part, _ in made.pre_tokenizer.pre_tokenize_str("It'll be 20245")] == parts


SMALL = dict.fromkeys(("embedding_length", "feed_forward_length", "context_length", "vocab_size"), 32)
SMALL |= dict.fromkeys(("block_count", "attention__head_count", "attention__head_count_kv"), 1)


def close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_of(path: Path, architecture: str = "llama", tensor: str = "token_embd.weight", **values: int | str) -> Path:
    """Write a GGUF file with a tensor and these fields, whose names have `__` for a dot."""
    writer = GGUFWriter(path, architecture)
    for name, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint16
        add(name.replace("__", "."), value)
    writer.add_tensor(tensor, torch.zeros(32, 32).numpy())
    close(writer)
    return path


def test_gguf_files_that_cannot_be_imported_are_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated, text = tmp_path / "truncated.gguf", tmp_path / "text.gguf"
    truncated.write_bytes(CUT.read_bytes()[:1_500_000])
    text.write_text("not a model")
    cases = {
        tmp_path / "none.gguf": "there is no file",
        truncated: "truncated.gguf is damaged or no GGUF file",
        text: "text.gguf is damaged or no GGUF file",
        file_of(tmp_path / "split.gguf", split__count=3): "is one of 3 files; join them",
        file_of(tmp_path / "other.gguf", "gemma3"): "general.architecture=gemma3 of",
        file_of(tmp_path / "mixtral.gguf", llama__expert_count=8): "llama.expert_count=8 of",
        file_of(tmp_path / "scaled.gguf", llama__rope__scaling__type="yarn"): "llama.rope.scaling.type=yarn of",
        file_of(tmp_path / "llama3.gguf", tensor="rope_freqs.weight"): "rope_freqs.weight of",
        file_of(
            tmp_path / "lacking.gguf", **{f"llama__{name}": SMALL[name] for name in SMALL}
        ): "transformers cannot read .*it lacks model.layers.0",
    }
    for file, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            import_model(str(file), tmp_path / "made.ckpt")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(gguf_file, "available_memory", lambda: 10**6)
    with pytest.raises(ValueError, match="GB of free memory"):
        import_model(str(CUT), tmp_path / "made.ckpt")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="GB free, and"):
        import_model(str(CUT), tmp_path / "made.ckpt")
    monkeypatch.undo()
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need the package gguf; .*: pip install -e"):
        import_model(str(CUT), tmp_path / "made.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f.name for f in cases if f.name != "none.gguf")
