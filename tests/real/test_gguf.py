"""A GGUF file of a real model, cut to 2 MB, and files that cannot be imported."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file
from tokenizers import decoders, models
from torch import Tensor

from nlgmoe.checkpoint.portable import load_model
from nlgmoe.tools.hugging_face import gguf_file
from nlgmoe.tools.hugging_face.importing import import_model
from tests.real import CUT

TEXT = "In 1984, it's 12345 metres;\n\n  def f(x):\treturn x\u00b2  # na\u00efve \u65e5\u672c"


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
        "qwen2": ["It", "'ll", "\u0120be", "\u0120", "2", "0", "2", "4", "5"],
    }.items(),
)
def test_pre_tokenizers_split_as_their_models_do(name: str, parts: list[str], tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    gguf_file._write_tokenizer(CUT, tmp_path, fields)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
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
    with pytest.raises(ValueError, match="need the package gguf; install it"):
        import_model(str(CUT), tmp_path / "made.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f.name for f in cases if f.name != "none.gguf")


ARCHITECTURES = {
    "qwen3": (MODEL_ARCH.QWEN3, transformers.Qwen3Config, {}),
    "qwen3moe": (
        MODEL_ARCH.QWEN3MOE,
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True},
    ),
}


def written(path: Path, architecture: str) -> Any:
    """Write a GGUF file of a small random model as llama.cpp's converter does; return the model.

    transformers takes the width of heads, 128, and of experts, 768, from Qwen's own models, not from the file.
    """
    arch, config_class, more = ARCHITECTURES[architecture]
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6}
    config = config_class(**sizes, **heads, **more, initializer_range=0.2, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path.parent / architecture, save_original_format=True)
    names, writer = get_tensor_name_map(arch, 2), GGUFWriter(path, architecture)
    fields = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "head_count": 4,
    }
    fields |= {"head_count_kv": 2, "key_length": 128, "value_length": 128, "vocab_size": 64, "name": "tiny"}
    fields |= {"layer_norm_rms_eps": 1e-6, "rope_freq_base": config.rope_parameters["rope_theta"]}
    if more:
        fields |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 768}
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    tensors = load_file(path.parent / architecture / "model.safetensors")
    experts: dict[str, list[Tensor]] = {}
    for name in sorted(tensors):
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.(.*)", name):
            experts.setdefault(f"{match[1]}.{match[2]}", []).append(tensors[name])
    whole = {name: value for name, value in tensors.items() if ".experts." not in name}
    for name, value in (whole | {name: torch.stack(parts) for name, parts in experts.items()}).items():
        writer.add_tensor(names.get_name(name, (".weight",)), value.numpy())
    close(writer)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_gguf_of_other_families_has_the_logits_of_their_model(architecture: str, tmp_path: Path) -> None:
    theirs = written(tmp_path / "tiny.gguf", architecture)
    imported = import_model(str(tmp_path / "tiny.gguf"), tmp_path / "tiny.ckpt")
    assert imported.model_type == architecture.replace("moe", "_moe")
    ours = load_model(tmp_path / "tiny.ckpt")
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.logits(ours(ids).hidden), theirs(ids).logits, rtol=0, atol=2e-5)
