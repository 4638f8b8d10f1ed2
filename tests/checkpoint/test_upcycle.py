"""A mixture made of a dense model computes what that did, and a run starts from it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nlgmoe import HashRouterConfig, Llama3, MLAConfig, MoEGPTModule, WarmStart, Yarn, load_model
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.surgery.upcycle import Ways, upcycle
from nlgmoe.tools.hugging_face.families import family_of
from tests.support.checkpoints import TOKENIZER, write
from tests.support.commands import error_of
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer

DENSE = GPTConfig(61, 16, 4, 32, 2, ffn_hidden_size=48)
TOKENS = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
OPEN = GPTConfig(
    61, 16, 4, 32, 4, init_std=0.3, norm="rmsnorm", rope_theta=100.0, num_kv_heads=2, qk_norm="head", bias=False,
    ffn_network="swiglu", tied_embeddings=False,
)  # fmt: skip
LLAMA = replace(OPEN, qk_norm=None)
LLAMA_3 = replace(LLAMA, rotary_scaling=Llama3(8.0, 8, 1.0, 2.0))
GRANITE = replace(LLAMA, embedding_scale=3.0, attention_scale=0.4, residual_scale=0.7, logit_scale=0.5)
LATENT = replace(
    LLAMA, num_kv_heads=None, attention=MLAConfig(8, 4, 4, 8), rotary_scaling=Yarn(4.0, 8), attention_scale=0.5
)
FREE = {"normalize_weights": False, "expert_interval": 1}  # weights that are not normalised
KINDS = {
    "top-1, layer map": (DENSE, MoEConfig([0, 3, 0, 4], expert_interval=1)),
    "residual top-2": (DENSE, MoEConfig(4, top_k=2, mlp_type="residual", normalize_weights=True, gate_init_std=0.2)),
    "summed top-2": (DENSE, MoEConfig(4, top_k=2, mlp_type="residual", residual_mix="sum")),
    "gated top-1, groups": (DENSE, MoEConfig([4, 6], groups=[2, 1], mlp_type="residual", residual_mix="sigmoid")),
    "top-3, groups": (DENSE, MoEConfig(8, top_k=3, groups=[4, 2])),
    "an open model": (OPEN, MoEConfig(4, expert_interval=1, top_k=2)),
    "Llama 3": (LLAMA_3, MoEConfig(4, expert_interval=1, top_k=2)),
    "Granite": (GRANITE, MoEConfig(4, expert_interval=1, top_k=2)),
    "Granite, summed": (GRANITE, MoEConfig(4, expert_interval=1, top_k=2, mlp_type="residual", residual_mix="sum")),
    "DeepSeek-V2": (LATENT, MoEConfig(6, top_k=3, gate_scale=16.0, groups=[3, 2], **FREE)),
    "OLMoE": (OPEN, MoEConfig(8, top_k=4, token_dropping=False, **FREE)),
    "free top-3, learned": (DENSE, MoEConfig(4, top_k=3, gate_scale=0.3, mlp_type="residual", **FREE)),
    "scaled top-2": (DENSE, MoEConfig(4, top_k=2, gate_scale=0.3)),
}

NATIVE = {
    **dict.fromkeys(("an open model", "OLMoE"), "qwen3_moe"),
    **{"Llama 3": "mixtral", "Granite": "granitemoe", "Granite, summed": "granitemoeshared"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense") / "dense.ckpt", DENSE, tokenizer=TOKENIZER.files)


def logits_of(path: Path) -> torch.Tensor:
    model = load_model(path)
    with torch.no_grad():
        return model.logits(model(TOKENS).hidden)


@torch.no_grad()
def assert_spread(out: Path, moe: MoEConfig, dtype: torch.dtype = torch.float32) -> None:
    """Tokens go to more experts than one has; where weights are not normalised, they are equal."""
    for routing in load_model(out)(TOKENS).routings:
        assert (routing.tokens_per_expert > 0).sum() > min(moe.top_k, routing.num_experts - 1)
        if not moe.normalizes:
            tolerance = 1e-4 if dtype == torch.float16 else 0
            equal = torch.full_like(routing.probs, 1 / routing.num_experts)
            torch.testing.assert_close(routing.probs, equal, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_upcycled_mixture_computes_what_the_dense_model_does(kind: str, tmp_path: Path) -> None:
    source, out, (config, moe) = tmp_path / "dense.ckpt", tmp_path / "moe.ckpt", KINDS[kind]
    write(source, config, tokenizer=TOKENIZER.files)
    assert upcycle(source, out, moe) == replace(config, moe=moe)
    assert list(find_problems(Checkpoint(out))) == [] and Checkpoint(out).tokenizer() == TOKENIZER.files
    expected = logits_of(source)
    torch.testing.assert_close(logits_of(out), expected, rtol=2e-6, atol=2e-6 * expected.abs().max().item())
    assert_spread(out, moe)
    if kind in NATIVE:
        assert family_of(load_model(out).config) == (NATIVE[kind], "")


def test_upcycled_gates_of_a_dense_model_in_fp16_are_not_rounded_to_zero(tmp_path: Path) -> None:
    half, moe = write(tmp_path / "half.ckpt", DENSE, dtype=torch.float16), MoEConfig(4)
    upcycle(half, tmp_path / "moe.ckpt", moe)
    assert_spread(tmp_path / "moe.ckpt", moe, torch.float16)


def test_upcycling_noise_is_as_large_as_its_setting(dense: Path, tmp_path: Path) -> None:
    for name, noise, seed in (("a", 0.1, 0), ("b", 0.1, 0), ("c", 0.1, 2)):
        upcycle(dense, tmp_path / f"{name}.ckpt", MoEConfig(4, top_k=2), Ways(noise=noise, seed=seed))
    a, b, c = (load_model(tmp_path / f"{name}.ckpt").blocks[1].moe.experts for name in "abc")
    ffn = load_model(dense).blocks[1].ffn
    for name, weight in (("up_weight", ffn.up.weight), ("down_weight", ffn.down.weight)):
        added = getattr(a, name) - weight.t()
        for expert in added:
            assert expert.std().item() == pytest.approx(0.1 * weight.std().item(), rel=0.1)
        assert not torch.equal(added[0], added[1])
        assert torch.equal(getattr(a, name), getattr(b, name)) and not torch.equal(getattr(a, name), getattr(c, name))
    assert torch.equal(a.up_bias, ffn.up.bias.expand_as(a.up_bias))


@pytest.mark.parametrize(
    ("config", "words", "expected", "said"),
    [
        (LLAMA, "", ("mixtral", 1, 2), "writes it as MixtralForCausalLM of transformers"),
        (OPEN, "", ("qwen3_moe", 1, 2), "writes it as Qwen3MoeForCausalLM of transformers"),
        (
            LLAMA,
            "--expert-interval 2",
            (None, 2, 2),
            "writes it with our code: qk_norm=null (the nearest family is qwen3_moe)",
        ),
        (GRANITE, "", ("granitemoe", 1, 2), "writes it as GraniteMoeForCausalLM of transformers"),
        (DENSE, "", (None, 2, 1), "writes it with our code: "),
    ],
)
def test_upcycled_model_stays_in_its_family_by_default(
    config: GPTConfig, words: str, expected: tuple, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "dense.ckpt", config), tmp_path / "moe.ckpt"
    main(["upcycle", str(source), str(out), "--num-experts=4", *words.split()])
    output = capsys.readouterr().out
    assert said in output
    made = load_model(out).config
    assert made.moe is not None and (family_of(made)[0], made.moe.expert_interval, made.moe.top_k) == expected
    if expected[0] is None:
        return
    assert (made.moe.token_dropping, made.moe.second_expert) == (False, "argmax")
    losses = []  # of the first step of training
    for model, path in ((config, source), (made, out)):
        module = MoEGPTModule(model, warm_start=WarmStart(str(path)))
        (run := trainer(tmp_path, max_steps=1)).fit(module, SyntheticData())
        losses.append(float(run.callback_metrics["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    experts = module.gpt.blocks[3].moe.experts.up_weight
    assert not torch.equal(experts[0], experts[1])  # from that step on


def test_upcycle_command_writes_a_checkpoint_and_refuses_wrong_settings(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a moe.ckpt"
    main(["upcycle", str(dense), str(out), "--num-experts", "[2,4]", "--mlp-type", "residual", "--noise", "0.01"])
    assert f"{out.with_suffix('.yaml')}: its settings\n" in capsys.readouterr().out
    assert load_model(out).config.moe == MoEConfig([2, 4], mlp_type="residual")
    assert "exists already" in error_of(capsys, "upcycle", dense, out)
    (out / "manifest.json").write_text("{}")
    main(["upcycle", str(dense), str(out), "--num-experts", "4", "--overwrite"])  # also one that cannot be read
    assert load_model(out).config.moe == MoEConfig(4)
    assert "no dense model" in error_of(capsys, "upcycle", dense, out, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="only the paper's router, not HashRouterConfig"):
        upcycle(dense, tmp_path / "other.ckpt", MoEConfig(4, router=HashRouterConfig()))
