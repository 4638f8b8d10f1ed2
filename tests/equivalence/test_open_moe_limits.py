"""What is native to a family of `transformers`, and what an import refuses by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nlgmoe import GPTConfig
from nlgmoe.config import MoEConfig
from nlgmoe.layers.routers import QuantileRouterConfig, SigmoidRouterConfig
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.hugging_face.families import FAMILIES, family_of
from nlgmoe.tools.hugging_face.importing import import_model
from tests.support.open_models import LATENT_YARN, SHAPE, scaled, their_model

NATIVE = GPTConfig(
    50, 32, 4, 32, 4, norm="rmsnorm", rope_theta=1e4, bias=False, ffn_network="swiglu",
    moe=MoEConfig(4, expert_interval=1, top_k=2),
)  # fmt: skip

DEEPSEEK: dict[str, Any] = {"mlp_type": "residual", "residual_mix": "sum", "groups": [2, 1]}
DEEPSEEK |= {"router": SigmoidRouterConfig()}


def changed(change: dict[str, Any]) -> GPTConfig:
    moe = change.get("moe")
    return replace(NATIVE, **change | ({"moe": replace(NATIVE.moe, **moe)} if moe else {}))


@pytest.mark.parametrize(
    ("change", "family", "reason"),
    [
        ({}, "mixtral", ""),
        ({"qk_norm": "head"}, "qwen3_moe", ""),
        ({"moe": None}, "llama", ""),
        ({"moe": None, "qk_norm": "head"}, "qwen3", ""),
        ({"rotary_dim": 4}, None, "rotary_dim=4 (the nearest family is mixtral)"),
        ({"moe": {"num_experts": [2, 2, 4, 4]}}, None, "num_experts=[2, 2, 4, 4] (the nearest family is mixtral)"),
        ({"moe": {"normalize_weights": False}, "qk_norm": "projection"}, "olmoe", ""),
        ({"moe": {"gate_scale": 2.0}}, None, "gate_scale=2.0 (the nearest family is mixtral)"),
        ({"qkv_bias": True, "moe": {"mlp_type": "residual", "residual_mix": "sigmoid"}}, "qwen2_moe", ""),
        ({"qk_norm": "head", "moe": DEEPSEEK}, "dots1", ""),
        ({"qk_norm": "projection", "rotary_dim": 4, "moe": {"router": SigmoidRouterConfig()}}, "minimax_m2", ""),
        ({"qk_norm": "head", "qkv_bias": False, "rotary_dim": 4, "moe": DEEPSEEK}, "glm4_moe", ""),
        (
            {"qk_norm": "head", "moe": DEEPSEEK | {"router": SigmoidRouterConfig(smooth=2.0)}},
            None,
            "(the nearest family is dots1)",
        ),
        ({"qk_norm": "head", "moe": DEEPSEEK | {"router": QuantileRouterConfig()}}, None, "(the nearest family is "),
        ({"moe": {"eval_token_dropping": True}}, None, "eval_token_dropping=true (the nearest family is mixtral)"),
    ],
)
def test_a_model_is_native_only_if_a_family_computes_it(
    change: dict[str, Any], family: str | None, reason: str
) -> None:
    config = changed(change)
    found, why = family_of(config)
    assert found == family and (why == reason or (family is None and reason in why))
    if family is not None:
        made = FAMILIES[family].config(FAMILIES[family].settings(config), Path("made"))
        assert experts_per_layer(made) == experts_per_layer(config)
        assert config.moe is None or made.moe.normalizes == config.moe.normalizes
        known = replace(made, moe=None, init_std=config.init_std, num_kv_heads=None, ffn_hidden_size=None)
        assert known == replace(config, moe=None)


REFUSED: list[tuple[str, dict[str, Any], str]] = [  # family, settings, message
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 of"),
    ("llama", {"rope_parameters": scaled("linear", 1e4, factor=2.0)}, "rope_type=linear of"),
    ("mixtral", {"sliding_window": 512}, "sliding_window=512 of"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with normalised weights of"),
    ("qwen2_moe", {"use_sliding_window": True}, "layer_types=.* of"),
    (
        "deepseek_v2",
        {"rope_parameters": LATENT_YARN | {"mscale": 1.0}},
        r"attention_factor=1.0.* \(mscale / mscale_all_dim\) of",
    ),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method=greedy of"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=fp8 of .* bf16"),
    ("gpt2", {"activation_function": "relu"}, "activation_function=relu of"),
]


@pytest.mark.parametrize(("family", "values", "message"), REFUSED)
def test_import_refuses_features_that_are_not_computed_by_name(
    family: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shape = SHAPE | {"intermediate_size": 40, "num_experts_per_tok": 2}
    getattr(transformers, f"{FAMILIES[family].classes}Config")(**shape | values).save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        import_model(str(tmp_path), tmp_path / "made.ckpt")
    assert "\n" not in str(raised.value) and not (tmp_path / "made.ckpt").exists()


def test_folders_that_do_not_fit_their_config_are_refused_by_name(tmp_path: Path) -> None:
    theirs, folder, gate = their_model("olmoe"), tmp_path / "theirs", "model.layers.2.mlp.gate.weight"
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for message, damaged in {
        f"lacks {gate}": {name: value for name, value in tensors.items() if name != gate},
        rf"{gate} is \[7, 48\], by config.json it is \[8, 48\]": tensors | {gate: torch.zeros(7, 48)},
        "has stray, which its config.json does not describe": tensors | {"stray": torch.zeros(1)},
    }.items():
        save_file(damaged, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            import_model(str(folder), tmp_path / "made.ckpt")
    assert not (tmp_path / "made.ckpt").exists()


def test_import_leaves_out_blocks_that_predict_further_tokens(tmp_path: Path) -> None:
    """GLM-4.5's files have one, after the model's own."""
    their_model("glm4_moe, half of a head turns").save_pretrained(tmp_path / "theirs")
    file, further = tmp_path / "theirs" / "model.safetensors", "model.layers.4.eh_proj.weight"
    save_file(load_file(file) | {further: torch.zeros(48, 96)}, file)
    assert import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt").dropped == [further]
    export(tmp_path / "ours.ckpt", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_folder_of_two_precisions_survives_import_and_export_to_the_bit(tmp_path: Path) -> None:
    """Some models keep their routers in fp32."""
    theirs = their_model("olmoe").bfloat16()
    for block in theirs.model.layers:
        block.mlp.gate.float().weight.data += 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export(tmp_path / "ours.ckpt", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert {value.dtype for value in before.values()} == {torch.bfloat16, torch.float32}
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name
