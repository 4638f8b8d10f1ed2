"""Models of other families against the classes of `transformers`: imported, run, trained, exported."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from nlgmoe import GPT, MoEGPTModule, WarmStart, generate, load_model
from nlgmoe.batch import Batch
from nlgmoe.eval.trace import Trace, TraceFacts, TraceWriter
from nlgmoe.layers.attention import KVCache
from nlgmoe.model.counting import count_parameters, parameters_of
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.pyramid import experts_per_layer, moe_blocks
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.hugging_face.families import FAMILIES, family_of
from nlgmoe.tools.hugging_face.importing import import_model
from tests.equivalence.variants import FAULTS, PUBLISHED, Fault, built_name
from tests.support.open_models import IMPORTED, their_model, tokens
from tests.support.synthetic import SyntheticData
from tests.support.trainers import Recorder, SaveAt, trainer


class Pair:
    """A model in both forms: the folder that `transformers` writes, and the checkpoint that is made of it."""

    def __init__(self, variant: str, root: Path) -> None:
        self.family = variant.partition(",")[0]
        self.folder, self.checkpoint = root / "theirs", root / "ours.ckpt"
        self.theirs = their_model(variant)
        self.theirs.save_pretrained(self.folder)
        self.imported = import_model(str(self.folder), self.checkpoint)
        self.ours = load_model(self.checkpoint).eval()


@pytest.fixture(scope="module", params=IMPORTED)
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
    count = count_parameters(pair.ours.config)
    assert (count.total, count.active) == parameters_of(pair.ours)


@torch.no_grad()
def test_a_trace_has_the_experts_that_router_logits_of_transformers_name(pair: Pair, tmp_path: Path) -> None:
    ids, blocks = tokens(), moe_blocks(pair.ours.config)
    if not blocks:
        return
    batch = Batch(
        tokens=ids, targets=ids, token_mask=torch.ones_like(ids, dtype=torch.bool), domain=torch.zeros(3).long()
    )
    facts = TraceFacts(list(blocks), list(blocks.values()), pair.ours.config.num_layers, ["all"])
    with TraceWriter(tmp_path / "trace.safetensors", facts, eod_id=-1) as writer:
        writer.add(batch, pair.ours(ids).routings)
    trace, moe = Trace(tmp_path / "trace.safetensors"), pair.ours.config.moe
    biases = [value for name, value in pair.theirs.state_dict().items() if "e_score_correction_bias" in name]
    assert moe is not None
    for layer, logits in enumerate(pair.theirs(ids, output_router_logits=True).router_logits):
        scores = logits.sigmoid() + biases[layer] if biases else logits  # [N, E]
        if moe.groups is None:
            expected = scores.topk(moe.top_k, dim=-1).indices
            assert torch.equal(torch.from_numpy(trace.experts_of(layer)).long(), expected)


@pytest.mark.parametrize(("variant", "wrong", "fault"), FAULTS)
@torch.no_grad()
def test_logits_show_a_wrong_name_order_scale_or_epsilon(
    variant: str, wrong: str, fault: Fault, tmp_path: Path
) -> None:
    """Otherwise equal logits would prove little."""
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
        expected = layout.entry(name, lambda tensor, where: theirs[built_name(pair.family, tensor)].grad[where])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5 * float(total))


@torch.no_grad()
def test_greedy_texts_are_those_of_transformers(pair: Pair) -> None:
    prompts = [[5, 6, 7, 8], [9, 3]]
    ours = generate(pair.ours, prompts, max_new_tokens=12, temperature=0)
    for prompt, text in zip(prompts, ours, strict=True):
        expected = pair.theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=True)
        assert text == expected[0].tolist()


@torch.no_grad()
def test_folder_of_transformers_survives_import_and_export_to_the_bit(pair: Pair, tmp_path: Path) -> None:
    if pair.family == "gpt2":  # imported only
        assert pair.ours.config.hidden_dropout == pair.theirs.config.resid_pdrop > 0
        return
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
        seen = Recorder()
        module = MoEGPTModule(pair.ours.config, AdamWConfig(lr=3e-3), warm_start=WarmStart(str(pair.checkpoint)))
        trainer(folder, seen, *callbacks, max_steps=30).fit(module, SyntheticData(89, 64), **options)
        return seen.losses

    whole = losses(tmp_path / "whole", SaveAt(20, tmp_path / "20.ckpt"))
    assert len(whole) == 30 and sum(whole[-5:]) < 0.9 * sum(whole[:5])
    assert losses(tmp_path / "resumed", ckpt_path=tmp_path / "20.ckpt") == whole[20:]


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_names_shapes_and_counts_of_ours(name: str) -> None:
    family, (total, active, values) = FAMILIES[name], PUBLISHED[name]
    theirs = getattr(transformers, f"{family.classes}Config")(**values)
    config = family.config(theirs.to_dict(), Path("published"))
    count = count_parameters(replace(config, vocab_size_multiple=1))
    assert (round(count.total / 1e9, 2), round(count.active / 1e9, 2)) == (total, active)
    with torch.device("meta"):
        model = getattr(transformers, f"{family.classes}ForCausalLM")(theirs)
    ours = {built_name(name, tensor): shape for tensor, shape in family.layout(config).shapes.items()}
    saved = {tensor: value.shape for tensor, value in model.state_dict().items()}  # buffers too
    if theirs.tie_word_embeddings:
        del saved["lm_head.weight"]
    assert sum(shape.numel() for shape in ours.values()) == sum(shape.numel() for shape in saved.values())
    assert all(ours[tensor] == shape for tensor, shape in saved.items() if ".experts." not in tensor)
    assert family_of(config, name) == (name, "")


def test_export_writes_the_family_that_is_named(tmp_path: Path) -> None:
    """A GLM-4 MoE Lite whose first blocks are dense is a DeepSeek-V3 too."""
    pair = Pair("glm4_moe_lite, whole queries, groups, yarn", tmp_path)
    assert family_of(pair.ours.config) == ("deepseek_v3", "")
    export(pair.checkpoint, tmp_path / "other", family="deepseek_v3")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other").eval()
    assert isinstance(other, transformers.DeepseekV3ForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens()).logits, pair.theirs(tokens()).logits, rtol=0, atol=2e-5)
    export(pair.checkpoint, tmp_path / "half", precision="bf16")
    types = {name: value.dtype for name, value in load_file(tmp_path / "half" / "model.safetensors").items()}
    assert {name for name, kind in types.items() if kind == torch.float32} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3)
    }
