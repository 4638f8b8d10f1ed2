"""Shards, drawn units, several parents, grown mixtures: what is exact is exact, and what is drawn has its statistics."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nlgmoe import GPT, GPTConfig, MoEConfig, Routing, load_model
from nlgmoe.checkpoint.entries import split_experts
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.commands.main import main
from nlgmoe.eval.interventions import remove_experts
from nlgmoe.layers.moe import moe_layers
from nlgmoe.surgery.grow import grow
from nlgmoe.surgery.upcycle import Ways, upcycle
from nlgmoe.surgery.write_weights import write_weights
from nlgmoe.tools.hugging_face.families import family_of
from nlgmoe.validation import SettingError
from tests.checkpoint.test_upcycle import DENSE, GRANITE, LATENT, LLAMA, OPEN, TOKENS, logits_of
from tests.support.checkpoints import TOKENIZER, write
from tests.support.commands import error_of

FREE = {"normalize_weights": False, "expert_interval": 1}
SHARDED: dict[str, tuple[GPTConfig, MoEConfig, int]] = {
    "biases, normalised": (DENSE, MoEConfig(8, top_k=4), 4),
    "softmax first": (DENSE, MoEConfig(8, top_k=4, gate_scale=0.7, **FREE), 2),
    "two of argmax": (DENSE, MoEConfig(6, top_k=2, second_expert="argmax"), 2),
    "residual, summed": (DENSE, MoEConfig(8, top_k=4, mlp_type="residual", residual_mix="sum"), 4),
    "a pyramid": (DENSE, MoEConfig([4, 8], top_k=4), 2),
    "a Llama": (LLAMA, MoEConfig(8, top_k=4, expert_interval=1), 4),
    "a Qwen3": (OPEN, MoEConfig(8, top_k=4, expert_interval=1), 2),
    "a Granite": (GRANITE, MoEConfig(8, top_k=6, expert_interval=1), 2),
    "DeepSeek-V2, groups": (LATENT, MoEConfig(12, top_k=4, groups=[3, 2], **FREE), 2),
}


def in_fp64(path: Path) -> Tensor:
    model = load_model(path).double()
    with torch.no_grad():
        return model.logits(model(TOKENS).hidden)


@pytest.mark.parametrize("kind", SHARDED)
def test_shards_compute_what_the_dense_model_does(kind: str, tmp_path: Path) -> None:
    (config, moe, granularity), out = SHARDED[kind], tmp_path / "moe.ckpt"
    dense = write(tmp_path / "dense.ckpt", config, torch.float64, tokenizer=TOKENIZER.files)
    made = upcycle(dense, out, moe, Ways(granularity))
    assert made.moe is not None and made.moe.expert_ffn_size == config.ffn_size // granularity
    assert list(find_problems(Checkpoint(out))) == []
    expected = in_fp64(dense)
    error = 1e-12 if moe.normalizes else 1e-10  # a gate of 1e-12 has logits of some 1e-11
    torch.testing.assert_close(in_fp64(out), expected, rtol=error, atol=error * float(expected.abs().max()))
    for routing in load_model(out)(TOKENS).routings:  # a token has all shards of a copy
        copies = (routing.expert // granularity).sort(dim=1).values
        assert (routing.tokens_per_expert > 0).sum() > moe.top_k or routing.num_experts <= moe.top_k
        assert torch.equal(copies, copies[:, ::granularity].repeat_interleave(granularity, dim=1))


def test_the_published_scale_is_another_function(tmp_path: Path) -> None:
    """Megatron-Core's: the cube root on each matrix."""
    dense, out = write(tmp_path / "dense.ckpt", LLAMA), tmp_path / "moe.ckpt"
    upcycle(dense, out, MoEConfig(8, top_k=4, expert_interval=1), Ways(4))
    model = load_model(out)
    with torch.no_grad():
        for layer in moe_layers(model):
            for name in ("gate", "up", "down"):
                weight = getattr(layer.experts, f"{name}_weight")
                weight *= 4 ** (1 / 3) / (4 if name == "down" else 1)
        changed = model.logits(model(TOKENS).hidden)
    expected = logits_of(dense)
    assert (changed - expected).norm() > 0.1 * expected.norm()


def test_no_units_drawn_anew_is_the_copy_to_the_bit(tmp_path: Path) -> None:
    dense, moe = write(tmp_path / "dense.ckpt", DENSE), MoEConfig(4, top_k=2)
    for name, ways in (("copy", Ways()), ("none", Ways(redraw=0.0)), ("few", Ways(redraw=0.01))):  # of 48 units: none
        upcycle(dense, tmp_path / f"{name}.ckpt", moe, ways)
    copy, *others = (load_model(tmp_path / f"{name}.ckpt").state_dict() for name in ("copy", "none", "few"))
    assert all(torch.equal(other[name], value) for other in others for name, value in copy.items())


@pytest.mark.parametrize(("config", "granularity"), [(DENSE, 1), (LLAMA, 1), (LLAMA, 2)])
def test_units_drawn_anew_are_those_of_all_matrices(config: GPTConfig, granularity: int, tmp_path: Path) -> None:
    config = replace(config, ffn_hidden_size=1024, hidden_size=64)
    dense, out = write(tmp_path / "dense.ckpt", config), tmp_path / "moe.ckpt"
    moe = MoEConfig(4, top_k=2, expert_interval=2, second_expert="argmax")
    for path, share in ((tmp_path / "copy.ckpt", 0.0), (out, 0.25)):
        upcycle(dense, path, moe, Ways(granularity, redraw=share))
    copy, drawn = (moe_layers(load_model(path))[0].experts for path in (tmp_path / "copy.ckpt", out))
    width, sets = 1024 // granularity, []
    for expert in range(4):
        changed = []  # [F] for each matrix and bias
        for name in copy.roles:
            if (before := getattr(copy, name)) is None or name == "down_bias":
                continue
            before, after = before[expert], getattr(drawn, name)[expert]
            moved = before != after
            units = moved.all(dim=1) if name == "down_weight" else moved.all(dim=0) if moved.dim() == 2 else moved
            assert units.sum() == width // 4
            changed.append(units)
            old, new = (of[moved].detach() for of in (before, after))
            assert moved.sum() == units.sum() * (64 if moved.dim() == 2 else 1)
            if moved.dim() == 2:
                assert float(new.std()) == pytest.approx(float(old.std()), rel=0.05)
                assert float(new.mean()) == pytest.approx(float(old.mean()), abs=4 * float(old.std()) / len(old) ** 0.5)
        assert all(torch.equal(units, changed[0]) for units in changed)
        sets.append(changed[0])
    assert not torch.equal(sets[0], sets[1])


def alike(folder: Path) -> list[Path]:
    """Three models of one shape with different weights."""
    paths = []
    for number in range(3):
        model = GPT(LLAMA, seed=number)
        entries = split_experts(model.state_dict())
        write_weights(path := folder / f"{number}.ckpt", entries.__getitem__, LLAMA, TOKENIZER.files)
        paths.append(path)
    return paths


def test_equal_parents_give_the_copy(tmp_path: Path) -> None:
    dense, moe = write(tmp_path / "dense.ckpt", DENSE), MoEConfig(6, top_k=2)
    upcycle(dense, tmp_path / "one.ckpt", moe)
    upcycle([dense] * 3, tmp_path / "three.ckpt", moe)
    one, three = (load_model(tmp_path / f"{name}.ckpt").state_dict() for name in ("one", "three"))
    assert all(torch.equal(three[name], value) for name, value in one.items())


def test_a_gate_that_chooses_one_parents_experts_computes_that_parent(tmp_path: Path) -> None:
    a, b, c = alike(tmp_path)
    out, moe = tmp_path / "moe.ckpt", MoEConfig(6, top_k=2, expert_interval=1, second_expert="argmax")
    upcycle([b, a, c], out, moe, Ways(rest="first"))
    model = load_model(out).double()
    expected = in_fp64(b)
    with torch.no_grad(), remove_experts(model, {layer: [2, 3, 4, 5] for layer in range(4)}):
        found = model.logits(model(TOKENS).hidden)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert (in_fp64(out) - expected).abs().max() > 1e-2


def test_the_rest_of_several_parents_is_their_mean(tmp_path: Path) -> None:
    paths, out = alike(tmp_path), tmp_path / "moe.ckpt"
    main(["upcycle", *map(str, paths), str(out), "--num-experts=3", "--top-k=1"])
    models, made = [load_model(path).state_dict() for path in paths], load_model(out)
    for name, value in made.state_dict().items():
        if ".moe." not in name:
            torch.testing.assert_close(
                value, torch.stack([model[name] for model in models]).mean(dim=0), rtol=1e-6, atol=1e-8
            )
    for parent, expert in enumerate(made.blocks[0].moe.experts.up_weight):
        assert torch.equal(expert, models[parent]["blocks.0.ffn.up.weight"].t())


GROWN: dict[str, tuple[GPTConfig, MoEConfig]] = {
    "top-1": (DENSE, MoEConfig(4)),
    "top-2": (DENSE, MoEConfig(4, top_k=2)),
    "a pyramid, residual": (DENSE, MoEConfig([2, 4], mlp_type="residual")),
    "a Mixtral": (LLAMA, MoEConfig(4, top_k=2, expert_interval=1, token_dropping=False, second_expert="argmax")),
    "an OLMoE": (OPEN, MoEConfig(4, top_k=3, **FREE)),
}


@pytest.mark.parametrize("kind", GROWN)
def test_a_mixture_with_k_doubled_computes_the_same(kind: str, tmp_path: Path) -> None:
    config, moe = GROWN[kind]
    source, out = write(tmp_path / "moe.ckpt", replace(config, moe=moe)), tmp_path / "grown.ckpt"
    numbers: Any = [2 * count for count in moe.num_experts] if isinstance(moe.num_experts, list) else 8
    made = grow(source, out, numbers, top_k=2 * moe.top_k)
    assert list(find_problems(Checkpoint(out))) == [] and made.moe is not None and made.moe.top_k == 2 * moe.top_k
    expected = in_fp64(source)  # in fp32 sums of twice the terms round by 1e-6
    torch.testing.assert_close(in_fp64(out), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    if kind == "a Mixtral":
        assert family_of(made)[0] == "mixtral"


def test_a_mixture_with_k_of_one_kept_computes_the_same(tmp_path: Path) -> None:
    source, out = write(tmp_path / "moe.ckpt", replace(DENSE, moe=MoEConfig(4))), tmp_path / "grown.ckpt"
    grow(source, out, 12)
    expected = in_fp64(source)
    torch.testing.assert_close(in_fp64(out), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def _first_choice_alone(router: Any, inputs: Any, routing: Routing) -> Routing:
    return replace(routing, weight=torch.tensor([1.0, 0.0]).expand_as(routing.weight))


def test_a_mixture_with_k_of_two_kept_computes_its_first_choice_alone(tmp_path: Path) -> None:
    config, out = replace(DENSE, moe=MoEConfig(4, top_k=2)), tmp_path / "grown.ckpt"
    config = replace(config, vocab_size=TOKENIZER.vocab_size)
    source = write(tmp_path / "moe.ckpt", config, tokenizer=TOKENIZER.files)
    main(["upcycle", str(source), str(out), "--num-experts=8"])
    first = load_model(source)
    for layer in moe_layers(first):
        layer.router.register_forward_hook(_first_choice_alone)
    with torch.no_grad():
        expected = first.logits(first(TOKENS).hidden)
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-5, atol=1e-5)
    assert (logits_of(out) - logits_of(source)).abs().max() > 1e-2
    grow(source, tmp_path / "noisy.ckpt", 8, noise=0.1)
    copies, noisy = (moe_layers(load_model(path))[0].router.weight for path in (out, tmp_path / "noisy.ckpt"))
    assert float((noisy - copies).std()) == pytest.approx(0.1 * float(copies.std()), rel=0.2)
    assert torch.equal(copies[0], copies[1]) and not torch.equal(noisy[0], noisy[1])


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, other = (
        write(tmp_path / "dense.ckpt", DENSE),
        write(tmp_path / "wide.ckpt", replace(DENSE, ffn_hidden_size=96)),
    )
    moe = write(tmp_path / "moe.ckpt", replace(DENSE, moe=MoEConfig(4, top_k=2)))
    out = tmp_path / "out.ckpt"
    for words, message in (
        ([dense, other, out], "wide.ckpt is no model like .*dense.ckpt: ffn_hidden_size=96, not 48"),
        ([dense, out, "--granularity=5"], "granularity=5 does not divide the dense model's width of 48"),
        (
            [dense, out, "--granularity=4", "--num-experts=6"],
            "granularity=4 does not divide num_experts=6; it counts shards",
        ),
        ([dense, out, "--granularity=4", "--top-k=2"], "granularity=4 does not divide top_k=2.* set top_k=4"),
        ([dense, out, "--redraw=1.5"], "redraw=1.5 must be from 0 to 1"),
        ([moe, out, "--num-experts=6"], "num_experts=6 is no multiple"),
        ([moe, out, "--num-experts=8", "--top-k=3"], "top_k=3 must be the mixture's 2, or 2 times as many, 4"),
    ):
        assert re.search(message, line := error_of(capsys, "upcycle", *words)), line
    with pytest.raises(SettingError, match=r"a sampled second expert is no shard .* second_expert=argmax"):
        upcycle(dense, out, MoEConfig(4, top_k=2), Ways(granularity=2))
