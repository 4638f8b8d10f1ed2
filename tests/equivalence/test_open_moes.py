"""Models of other families against the classes of `transformers`: imported, run, trained, exported."""

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from nlgmoe import GPT, GPTConfig, MoEGPTModule, Router, RouterConfig, WarmStart, experts_at, generate, load_model
from nlgmoe.config import MoEConfig
from nlgmoe.layers.attention import KVCache
from nlgmoe.layers.router import TopKRouter
from nlgmoe.layers.routers import SigmoidRouterConfig
from nlgmoe.model.counting import count_parameters, parameters_of
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.hugging_face.families import FAMILIES, family_of
from nlgmoe.tools.hugging_face.importing import import_model
from nlgmoe.tools.hugging_face.model_card import client_limits
from tests.equivalence.variants import FAULTS, PUBLISHED, Fault, built_name
from tests.support.open_models import LATENT_YARN, SHAPE, VARIANTS, their_model, tokens
from tests.support.synthetic import SyntheticData
from tests.support.trainers import Losses, SaveAt, trainer


class Pair:
    """A model in both forms: the folder that `transformers` writes, and the checkpoint that is made of it."""

    def __init__(self, variant: str, root: Path) -> None:
        self.family = VARIANTS[variant][0]
        self.folder, self.checkpoint = root / "theirs", root / "ours.ckpt"
        self.theirs = their_model(variant)
        self.theirs.save_pretrained(self.folder)
        self.imported = import_model(str(self.folder), self.checkpoint)
        self.ours = load_model(self.checkpoint).eval()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("pair"))


@torch.no_grad()
def test_logits_are_those_of_transformers_also_with_padding_and_a_cache(pair: Pair) -> None:
    ids = tokens()
    expected = pair.theirs(ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(pair.ours.logits(pair.ours(ids).hidden), expected, rtol=0, atol=2e-5)

    mask = torch.ones(3, 17, dtype=torch.bool)
    mask[1, :5] = False
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    expected = pair.theirs(ids, attention_mask=mask.long(), position_ids=positions).logits[mask]
    torch.testing.assert_close(pair.ours.logits(pair.ours(ids, mask).hidden)[mask], expected, rtol=0, atol=2e-5)

    cache = KVCache(17)
    parts = [pair.ours(part, cache=cache).hidden for part in ids.split([9, *[1] * 8], dim=1)]
    torch.testing.assert_close(pair.ours.logits(torch.cat(parts, dim=1)), pair.theirs(ids).logits, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", FAULTS)
@torch.no_grad()
def test_logits_show_a_wrong_name_order_scale_or_epsilon(name: str, tmp_path: Path) -> None:
    """Otherwise equal logits would prove little."""
    variant, fault = FAULTS[name]
    pair = Pair(variant, tmp_path)
    expected = pair.theirs(tokens()).logits
    assert (broken_logits(pair.ours, lambda config, state: config) - expected).abs().max() < 2e-5
    assert (broken_logits(pair.ours, fault) - expected).abs().max() > 5e-5


def broken_logits(model: GPT, fault: Fault) -> Tensor:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    broken = GPT(fault(model.config, state)).eval()
    broken.load_state_dict({name: state[name] for name in broken.state_dict()})  # a fault may lack biases
    logits: Tensor = broken.logits(broken(tokens()).hidden)
    return logits


def test_gradients_are_those_of_transformers(pair: Pair) -> None:
    """Of every tensor of the files: each is compared under its own name."""
    ids = tokens()
    for model in (pair.theirs, pair.ours):
        model.zero_grad()
    F.cross_entropy(pair.theirs(ids).logits.flatten(0, 1), ids.flatten()).backward()
    F.cross_entropy(pair.ours.logits(pair.ours(ids).hidden).flatten(0, 1), ids.flatten()).backward()
    for name, parameter in pair.ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    total = torch.nn.utils.get_total_norm([p.grad for p in pair.theirs.parameters() if p.grad is not None])
    ours = torch.nn.utils.get_total_norm([p.grad for p in pair.ours.parameters()])  # type: ignore[misc]
    assert float(ours) == pytest.approx(float(total), rel=1e-5)
    theirs, layout = dict(pair.theirs.named_parameters()), FAMILIES[pair.family].layout(pair.ours.config)
    for name, parameter in pair.ours.named_parameters():
        if ".experts." in name:
            continue  # stacks, in one form or another: their norm is in the total
        parts = []
        for place in layout.of_entry[name]:
            theirs_grad = theirs[built_name(pair.family, place.tensor)].grad
            parts.append(place.restore(theirs_grad[place.where]))
        expected = torch.cat(parts)
        grad = parameter.grad[: len(expected)]  # type: ignore[index]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(total))


@torch.no_grad()
def test_greedy_texts_are_those_of_transformers(pair: Pair) -> None:
    prompts = [[5, 6, 7, 8], [9, 3]]
    ours = generate(pair.ours, prompts, max_new_tokens=12, temperature=0)
    for prompt, text in zip(prompts, ours, strict=True):
        expected = pair.theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=True)
        assert text == expected[0, len(prompt) :].tolist() or text == expected[0].tolist()


@torch.no_grad()
def test_folder_of_transformers_survives_import_and_export_to_the_bit(pair: Pair, tmp_path: Path) -> None:
    done = export(pair.checkpoint, tmp_path / "back")
    assert done.family == pair.family and not list((tmp_path / "back").glob("*.py"))
    before, after = (load_file(folder / "model.safetensors") for folder in (pair.folder, tmp_path / "back"))
    before.pop("lm_head.weight", None) if pair.theirs.config.tie_word_embeddings else None
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(again) is type(pair.theirs) and not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(again.eval()(tokens()).logits, pair.theirs(tokens()).logits)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    # Where mlx-lm and llama.cpp read them; `transformers` itself writes neither for every family.
    experts = max(experts_per_layer(pair.ours.config)) or None
    assert written["rope_theta"] == pair.ours.config.rope_theta and written.get("num_experts") == experts
    assert pair.family != "mixtral" or written["num_local_experts"] == experts
    assert {written[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")} == {None}


@pytest.mark.parametrize("pair", ["qwen3_moe, wide heads, a dense block"], indirect=True)
def test_imported_model_trains_and_resumes(pair: Pair, tmp_path: Path) -> None:
    """30 steps from the imported weights; resumed after 20, the losses are the same to the bit."""

    def losses(folder: Path, *callbacks: Any, **options: Any) -> list[float]:
        seen = Losses()
        module = MoEGPTModule(pair.ours.config, AdamWConfig(lr=3e-3), warm_start=WarmStart(str(pair.checkpoint)))
        trainer(folder, seen, *callbacks, max_steps=30).fit(module, SyntheticData(89, 64), **options)
        return seen.found

    whole = losses(tmp_path / "whole", SaveAt(20, tmp_path / "20.ckpt"))
    assert len(whole) == 30 and sum(whole[-5:]) < 0.9 * sum(whole[:5])
    assert losses(tmp_path / "resumed", ckpt_path=tmp_path / "20.ckpt") == whole[20:]


def test_parameters_are_counted_as_transformers_counts_them(pair: Pair) -> None:
    count = count_parameters(pair.ours.config)
    assert (count.total, count.active) == parameters_of(pair.ours)


@torch.no_grad()
def test_half_precision_is_as_close_to_fp32_as_that_of_transformers(pair: Pair) -> None:
    """By the median over logits: near a tie both may choose another expert than fp32 does, and not the same."""
    ids = tokens(8)
    expected = pair.theirs(ids).logits
    theirs = (deepcopy(pair.theirs).bfloat16()(ids).logits.float() - expected).abs().median()
    half = GPT(pair.ours.config).bfloat16().eval()
    half.load_state_dict(pair.ours.state_dict())
    ours = (half.logits(half(ids).hidden).float() - expected).abs().median()
    assert ours < 1.25 * theirs


@pytest.mark.parametrize("model_name", PUBLISHED)
def test_published_models_have_the_names_shapes_and_counts_of_ours(model_name: str) -> None:
    family, (values, total, active) = model_name.partition(",")[0], PUBLISHED[model_name]
    theirs = getattr(transformers, f"{FAMILIES[family].classes}Config")(**values)
    config = FAMILIES[family].config(theirs.to_dict(), Path("published"))
    count = count_parameters(config, padded=False)
    assert (round(count.total / 1e9, 2), round(count.active / 1e9, 2)) == (total, active)
    with torch.device("meta"):
        model = getattr(transformers, f"{FAMILIES[family].classes}ForCausalLM")(theirs)
    ours = {built_name(family, name): shape for name, shape in FAMILIES[family].layout(config).shapes.items()}
    saved = {name: tensor.shape for name, tensor in model.state_dict().items()}  # buffers too
    if theirs.tie_word_embeddings:
        del saved["lm_head.weight"]
    assert sum(shape.numel() for shape in ours.values()) == sum(shape.numel() for shape in saved.values())
    for name, shape in saved.items():
        if ".experts." not in name:
            assert ours[name] == shape
    assert family_of(config, family) == (family, "")


def test_export_writes_the_family_of_the_import_or_the_one_that_is_named(tmp_path: Path) -> None:
    """A GLM-4 MoE Lite whose first blocks are dense is a DeepSeek-V3 too."""
    pair = Pair("glm4_moe_lite, whole queries, groups, yarn", tmp_path)
    assert family_of(pair.ours.config) == ("deepseek_v3", "")
    assert export(pair.checkpoint, tmp_path / "back").family == "glm4_moe_lite"
    assert export(pair.checkpoint, tmp_path / "other", family="deepseek_v3").family == "deepseek_v3"
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other").eval()
    assert isinstance(other, transformers.DeepseekV3ForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens()).logits, pair.theirs(tokens()).logits, rtol=0, atol=2e-5)
    export(pair.checkpoint, tmp_path / "half", precision="bf16")
    types = {name: value.dtype for name, value in load_file(tmp_path / "half" / "model.safetensors").items()}
    assert {name for name, kind in types.items() if kind == torch.float32} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3)
    }
    with pytest.raises(ValueError, match=r"family=deepseek_v2 does not compute a model with .*router=SigmoidRouter"):
        export(pair.checkpoint, tmp_path / "third", family="deepseek_v2")


NATIVE = GPTConfig(
    50, 32, 4, 32, 4, norm="rmsnorm", rope_theta=1e4, bias=False, ffn_network="swiglu",
    moe=MoEConfig(4, expert_interval=1, top_k=2),
)  # fmt: skip

DEEPSEEK = {"mlp_type": "residual", "residual_mix": "sum", "groups": [2, 1], "router": SigmoidRouterConfig()}


@pytest.mark.parametrize(
    ("change", "family", "reason"),
    [
        ({}, "mixtral", ""),
        ({"qk_norm": "head"}, "qwen3_moe", ""),
        ({"qk_norm": "projection"}, "olmoe", ""),
        ({"moe": None}, "llama", ""),
        ({"moe": None, "qk_norm": "head"}, "qwen3", ""),
        ({"moe": None, "qk_norm": "projection"}, None, "qk_norm=projection (the nearest family is llama)"),
        ({"rotary_dim": 4}, None, "rotary_dim=4 (the nearest family is mixtral)"),
        ({"rope_theta": None}, None, "rope_theta=null (the nearest family is mixtral)"),
        ({"moe": {"num_experts": [2, 2, 4, 4]}}, None, "num_experts=[2, 2, 4, 4] (the nearest family is mixtral)"),
        ({"moe": {"num_experts": [0, 4, 4, 4]}}, None, "qk_norm=null (the nearest family is qwen3_moe)"),
        (
            {"moe": {"normalize_weights": False}},
            None,
            "qk_norm=null (the nearest family is olmoe)",
        ),
        ({"moe": {"normalize_weights": False}, "qk_norm": "projection"}, "olmoe", ""),
        ({"moe": {"gate_scale": 2.0}}, None, "gate_scale=2.0 (the nearest family is mixtral)"),
        ({"qkv_bias": True, "moe": {"mlp_type": "residual", "residual_mix": "sigmoid"}}, "qwen2_moe", ""),
        ({"qk_norm": "head", "moe": DEEPSEEK}, "dots1", ""),
        ({"qk_norm": "projection", "rotary_dim": 4, "moe": {"router": SigmoidRouterConfig()}}, "minimax_m2", ""),
        ({"qk_norm": "head", "qkv_bias": False, "rotary_dim": 4, "moe": DEEPSEEK}, "glm4_moe", ""),
        (
            {"qk_norm": "head", "rotary_dim": 4, "moe": {**DEEPSEEK, "num_experts": [0, 4, 0, 4]}},
            None,
            "num_experts=[0, 4, 0, 4] (the nearest family is glm4_moe)",
        ),
        (
            {"qk_norm": "head", "moe": {**DEEPSEEK, "shared_ffn_size": 100}},
            None,
            "shared_ffn_size=100 (the nearest family is dots1)",
        ),
        ({"moe": {"eval_token_dropping": True}}, None, "eval_token_dropping=true (the nearest family is mixtral)"),
    ],
)
def test_a_model_is_native_only_if_a_family_computes_it(
    change: dict[str, Any], family: str | None, reason: str
) -> None:
    if isinstance(change.get("moe"), dict):
        change = {**change, "moe": replace(NATIVE.moe, **change["moe"])}
    config = replace(NATIVE, **change)
    assert family_of(config) == (family, reason)
    if family is not None:
        made = FAMILIES[family].config(FAMILIES[family].settings(config), Path("made"))
        assert experts_per_layer(made) == experts_per_layer(config)
        assert config.moe is None or made.moe.normalizes == config.moe.normalizes
        assert replace(made, moe=None, init_std=config.init_std, num_kv_heads=None, ffn_hidden_size=None) == replace(
            config, moe=None
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qk_norm": "projection", "moe": {"normalize_weights": False}}, []),
        ({"qk_norm": "projection"}, ["norm_topk_prob=true"]),
        ({"qk_norm": "projection", "tied_embeddings": True}, ["norm_topk_prob=true", "tied embeddings"]),
        ({"qk_norm": "head"}, []),
        ({"qk_norm": "head", "moe": {"num_experts": [0, 4, 4, 4]}}, ["dense blocks"]),
        ({"head_dim": 12}, ["mlx-lm refuses the model: for mixtral it takes no head_dim=12"]),
        ({"moe": {"gate_scale": 2.0}}, ["llama.cpp, vLLM and mlx-lm refuse"]),
    ],
)
def test_limits_of_other_programs_are_named_where_they_concern_the_model(
    change: dict[str, Any], words: list[str]
) -> None:
    if isinstance(change.get("moe"), dict):
        change = {**change, "moe": replace(NATIVE.moe, **change["moe"])}
    config = replace(NATIVE, **{"tied_embeddings": False} | change)
    lines = list(client_limits(config, family_of(config)[0], own_tokenizer=False))
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines
    own = list(client_limits(config, family_of(config)[0], own_tokenizer=True))
    assert len(own) - len(lines) == (family_of(config)[0] is not None)


class SquaredRouter(TopKRouter):
    def _scores(self, logits: Tensor, probs: Tensor) -> Tensor:
        return probs.square()


@dataclass(frozen=True)
class SquaredRouterConfig(RouterConfig):
    """A user's router that computes other weights than the paper's, from which it derives."""

    def build(self, config: GPTConfig, block: int) -> Router:
        assert config.moe is not None
        return SquaredRouter(config.moe, config.hidden_size, experts_at(config, block), block)


def test_router_that_derives_from_the_papers_is_not_native(tmp_path: Path) -> None:
    moe = replace(NATIVE.moe, router=SquaredRouterConfig())
    config = replace(NATIVE, vocab_size=61, qk_norm="projection", moe=moe)
    trainer(tmp_path, SaveAt(1, tmp_path / "own.ckpt"), max_steps=1).fit(MoEGPTModule(config), SyntheticData())
    with pytest.raises(ValueError, match="holds only the paper's router, not SquaredRouterConfig"):
        export(tmp_path / "own.ckpt", tmp_path / "export")
    assert family_of(config) == (None, "router=SquaredRouterConfig (the nearest family is olmoe)")


REFUSED = {
    "clip_qkv": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 of"),
    "attention_bias": ("llama", {"attention_bias": True}, "attention_bias=True of"),
    "sliding window": ("mixtral", {"sliding_window": 512}, "sliding_window=512 of"),
    "scaled rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type=linear of",
    ),
    "a part that turns, which the class ignores": (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5 of",
    ),
    "no shared expert": ("granitemoeshared", {"shared_intermediate_size": 0}, "shared_intermediate_size=0 of"),
    "another activation": ("granitemoeshared", {"hidden_act": "gelu"}, "hidden_act=gelu of"),
    "jitter": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 of"),
    "one normalised weight": (
        "mixtral",
        {"num_experts_per_tok": 1},
        "num_experts_per_tok=1 with normalised weights of",
    ),
    "settings by layer": (
        "qwen3_moe",
        {"per_layer_config": {0: {"num_experts": 4}}, "intermediate_size": 40},
        "per_layer_config of",
    ),
    "a window in some layers": ("qwen2_moe", {"use_sliding_window": True}, "layer_types=.* of"),
    "latents and two temperatures": (
        "deepseek_v2",
        {"num_experts_per_tok": 2, "rope_parameters": LATENT_YARN | {"mscale": 1.0}},
        r"attention_factor=1.0.* \(mscale / mscale_all_dim\) of",
    ),
    "latents and YaRN's own temperature": (
        "glm4_moe_lite",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        r"attention_factor=1.138.* of",
    ),
    "another choice": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method=greedy of"),
    "an unknown choice": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method=noaux_tc of"),
    "rotation in halves": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False of"),
    "every second block": ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq=2 of"),
    "scores of another router": ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func=softmax of"),
    "norms of heads": ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type=per_head of"),
    "a shared expert of another family": (
        "minimax_m2",
        {"shared_intermediate_size": 40},
        "shared_intermediate_size=40 of",
    ),
    "FP8": ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=fp8 of .* bf16"),
    "GPT-2's activation": ("gpt2", {"activation_function": "relu"}, "activation_function=relu of"),
    "scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses_features_that_are_not_computed_by_name(case: str, tmp_path: Path) -> None:
    family, values, message = REFUSED[case]
    config = getattr(transformers, f"{FAMILIES[family].classes}Config")(**{**SHAPE, "intermediate_size": 40, **values})
    config.save_pretrained(tmp_path)
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
    (folder / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ValueError, match=r"model_type=gemma of .* cannot be imported; supported are nlgmoe .*mixtral"):
        import_model(str(folder), tmp_path / "made.ckpt")
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(ValueError, match="fused format"):
        import_model(str(tmp_path / "fused"), tmp_path / "made.ckpt")
    assert not (tmp_path / "made.ckpt").exists()


def test_import_leaves_out_blocks_that_predict_further_tokens(tmp_path: Path) -> None:
    """GLM-4.5's files have one, after the model's own; `num_nextn_predict_layers` counts them."""
    their_model("glm4_moe, half of a head turns").save_pretrained(tmp_path / "theirs")
    file, further = tmp_path / "theirs" / "model.safetensors", "model.layers.4.eh_proj.weight"
    save_file(load_file(file) | {further: torch.zeros(48, 96)}, file)
    assert import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt").dropped == [further]
    done = export(tmp_path / "ours.ckpt", tmp_path / "back")
    assert done.family == "glm4_moe"
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
