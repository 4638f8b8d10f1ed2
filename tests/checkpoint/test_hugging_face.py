"""Exported folders work without this project, and come back bit for bit; GPT-2 comes in; dense models become mixtures."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nlgmoe import generate, load_model, load_pretrained
from nlgmoe.checkpoint.entries import split_experts
from nlgmoe.checkpoint.folder import TensorFiles, read_document, read_tokenizer
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.checkpoint.weights_only import write_weights
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.tokenizer import PROBE, Tokenizer, load_tokenizer, train_byte_level_bpe
from nlgmoe.layers.attention import AttentionContext
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.layers.router import RoutingContext
from nlgmoe.model.counting import count_parameters
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.hugging_face.modeling_nlgmoe import CACHE, NlgmoeForCausalLM

TOKENIZER = Tokenizer(train_byte_level_bpe(iter(["the king and the queen"] * 3), 300), "tiny")
PR_MOE = GPTConfig(
    TOKENIZER.vocab_size, 24, 4, 32, 2, moe=MoEConfig([2, 4], mlp_type="residual", loss_coeff=0.1, z_loss_coeff=0.2)
)
CONFIGS = {
    "moe": GPTConfig(TOKENIZER.vocab_size, 24, 2, 32, 2, hidden_dropout=0.1, moe=MoEConfig(4, top_k=2)),
    "pr_moe": PR_MOE,
    "dense": GPTConfig(TOKENIZER.vocab_size, 24, 2, 32, 2, ffn_hidden_size=48),
    "modern": replace(  # no family has a pyramid
        PR_MOE, norm="rmsnorm", rope_theta=1e4, qk_norm="head", num_kv_heads=1, bias=False, ffn_network="swiglu",
        tied_embeddings=False,
    ),
}  # fmt: skip


def write(path: Path, config: GPTConfig, dtype: torch.dtype = torch.float32, tokenizer: str | None = None) -> Path:
    """A checkpoint whose every value matters: far from the initial ones."""
    model = GPT(config)
    for index, parameter in enumerate(model.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    entries = split_experts({name: value.to(dtype) for name, value in model.state_dict().items()})
    write_weights(path, entries.__getitem__, config, tokenizer)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {n: write(folder / f"{n}.ckpt", c, tokenizer=TOKENIZER.to_json()) for n, c in CONFIGS.items()}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("folders")
    for name, checkpoint in checkpoints.items():
        main(["export", str(checkpoint), str(folder / name)])
    return {name: folder / name for name in checkpoints}


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code in (1, 2) and len(lines) == 1, lines
    assert "unexpected" not in lines[0]
    return lines[0]


def test_folders_work_where_only_transformers_is(
    checkpoints: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    names = ("pr_moe", "modern")
    copies = [str(shutil.copytree(folders[name], tmp_path / name)) for name in names]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("load_alone.py")
    command = [sys.executable, str(script), str(tmp_path / "results.json"), *copies]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    tokens = torch.arange(24).view(2, 12)
    for name, folder in zip(names, copies, strict=True):
        found, model = results[folder], load_model(checkpoints[name])
        assert found["class"].startswith("transformers_modules.")
        with torch.no_grad():
            assert torch.equal(torch.tensor(found["logits"]), model.logits(model(tokens).hidden))
            half = model.to(torch.bfloat16)
            assert torch.equal(torch.tensor(found["bf16"]), half.logits(half(tokens).hidden).float())
        model = load_model(checkpoints[name])
        for prompt, new in zip(found["prompts"], found["greedy"], strict=True):
            ids = TOKENIZER.encode(prompt)
            assert generate(model, [ids], 8, temperature=0)[0] == ids + new
        assert found["uncached"] == found["greedy"] != found["beams"]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_exported_comes_back_bit_for_bit(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for left in ("folder", "back.ckpt"):  # by processes that were killed
        (tmp_path / f".{left}.writing-4194305").mkdir()
    main(["export", str(checkpoints[name]), str(tmp_path / "folder"), "--max-shard-size", "40KB"])
    index = json.loads((tmp_path / "folder/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in (tmp_path / "folder").glob("*.safetensors")) and len(files) >= 3
    for file in files:
        with safe_open(tmp_path / "folder" / file, "pt") as tensors:
            values = [tensors.get_tensor(name).nbytes for name in tensors.keys()]  # noqa: SIM118
            assert sum(values) <= 40_000 or len(values) == 1
    modes = {file.stat().st_mode for file in (tmp_path / "folder").iterdir()}
    (tmp_path / "folder/modeling_nlgmoe.py").write_text("raise AssertionError('the code of a folder is run')")
    main(["import", str(tmp_path / "folder"), str(tmp_path / "back.ckpt")])
    assert modes == {file.stat().st_mode for file in (tmp_path / "back.ckpt").iterdir()}  # weights others can read too
    assert list(find_problems(tmp_path / "back.ckpt")) == []
    there, back = (TensorFiles(path, "model").read_all() for path in (checkpoints[name], tmp_path / "back.ckpt"))
    assert there.keys() == back.keys() and all(torch.equal(there[entry], back[entry]) for entry in there)
    assert read_document(tmp_path / "back.ckpt")["model_config"] == CONFIGS[name].to_dict()
    assert read_tokenizer(tmp_path / "back.ckpt") == TOKENIZER.to_json()
    assert load_pretrained(tmp_path / "back.ckpt").tokenizer.fingerprint == TOKENIZER.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.ckpt", "back.yaml", "folder"]


def test_bf16_is_written_on_request_and_kept(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    main(["export", str(checkpoints["moe"]), str(tmp_path / "half"), "--precision", "bf16"])
    main(["import", str(tmp_path / "half"), str(tmp_path / "half.ckpt")])
    main(["export", str(tmp_path / "half.ckpt"), str(tmp_path / "again")])
    half, again = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "again"))
    whole = load_model(checkpoints["moe"]).state_dict()
    assert all(torch.equal(half["model." + name], value.to(torch.bfloat16)) for name, value in whole.items())
    assert all(again[name].dtype == torch.bfloat16 and torch.equal(again[name], value) for name, value in half.items())
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["pr_moe", "dense"])
def test_losses_are_those_of_our_training(name: str, folders: dict[str, Path]) -> None:
    model = NlgmoeForCausalLM.from_pretrained(folders[name])
    tokens = torch.randint(TOKENIZER.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100)
    ours, targets = model.model, labels[:, 1:].flatten()

    def language(hidden: torch.Tensor) -> torch.Tensor:
        counted = targets != -100
        return cross_entropy(
            hidden[:, :-1].flatten(0, 1), ours.unembedding, ours.config.vocab_size, targets.clamp_min(0), counted, 10
        )

    torch.testing.assert_close(model(tokens, labels=labels).loss, language(ours(tokens).hidden), rtol=1e-6, atol=0)
    model.train()
    torch.manual_seed(0)  # of the tokens that keep the slots
    found = model(tokens, labels=labels)
    torch.manual_seed(0)
    output = ours(tokens)
    expected = language(output.hidden)
    if output.routings:
        balance, z = router_losses(output.routings)
        expected = expected + 0.1 * balance + 0.2 * z
        torch.testing.assert_close(found.aux_loss, 0.1 * balance + 0.2 * z, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    found.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    model(tokens, labels=labels).loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_what_transformers_asks_of_a_model(folders: dict[str, Path], tmp_path: Path) -> None:
    model = NlgmoeForCausalLM.from_pretrained(folders["pr_moe"])
    tokens = torch.arange(12).view(2, 6)
    output = model(tokens, output_hidden_states=True, output_router_logits=True, use_cache=True)
    assert len(output.hidden_states) == 5 and [tuple(t.shape) for t in output.router_logits] == [(12, 2), (12, 4)]
    assert torch.equal(model.model.logits(output.hidden_states[-1]), output.logits)
    with torch.no_grad():
        block = model.model.blocks[0](output.hidden_states[0], AttentionContext(tokens), RoutingContext())[0]
    torch.testing.assert_close(block, output.hidden_states[1])
    assert not model(tokens).hidden_states and not model(tokens).get(CACHE)
    assert torch.equal(model(tokens, logits_to_keep=2).logits, output.logits[:, -2:])
    following = model(tokens[:, :1], **{CACHE: output[CACHE]}).logits
    torch.testing.assert_close(
        following, model(torch.cat([tokens, tokens[:, :1]], 1)).logits[:, -1:], rtol=1e-4, atol=1e-5
    )

    with pytest.raises(ValueError, match="output_attentions=True"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="longer than seq_len=24"):
        model.generate(tokens, max_new_tokens=30, eos_token_id=None)

    model.resize_token_embeddings(TOKENIZER.vocab_size + 3)
    model.save_pretrained(tmp_path)
    larger = NlgmoeForCausalLM.from_pretrained(tmp_path)
    assert larger(tokens).logits.shape[-1] == TOKENIZER.vocab_size + 3
    torch.testing.assert_close(larger(tokens).logits[..., : TOKENIZER.vocab_size], output.logits)


def test_the_tokenizer_gives_our_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folders["moe"], trust_remote_code=True)
    assert theirs(PROBE, split_special_tokens=True).input_ids == TOKENIZER.encode(PROBE)
    assert theirs.decode(TOKENIZER.encode(PROBE)) == PROBE
    assert theirs("a<|endoftext|>").input_ids == [*TOKENIZER.encode("a"), TOKENIZER.eod_id]
    assert (theirs.eos_token_id, theirs.model_max_length, theirs.padding_side) == (TOKENIZER.eod_id, 24, "left")
    theirs(["the king and the queen"], truncation=True, max_length=3)  # leaves its mark in what is saved
    theirs.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), tmp_path).encode(PROBE) == TOKENIZER.encode(PROBE)


def test_export_says_what_is_wrong(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert "exists and is not an empty folder" in error_of(capsys, "export", checkpoints["moe"], tmp_path / "full")
    damaged = tmp_path / "damaged.ckpt"
    shutil.copytree(checkpoints["moe"], damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    assert "is damaged" in error_of(capsys, "export", damaged, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged.ckpt", "full"], "something was left behind"
    bare = write(tmp_path / "bare.ckpt", CONFIGS["dense"])
    capsys.readouterr()
    main(["export", str(bare), str(tmp_path / "bare")])
    assert "without a tokenizer" in capsys.readouterr().out and not (tmp_path / "bare/tokenizer.json").exists()
    assert NlgmoeForCausalLM.from_pretrained(tmp_path / "bare").config.moe is None


def test_import_says_what_is_wrong(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.ckpt"
    folder = tmp_path / "folder"
    shutil.copytree(folders["moe"], folder)
    weights = load_file(folder / "model.safetensors")
    router = "model.blocks.1.moe.router.weight"
    for message, tensors in {
        f"lacks {router}": {name: value for name, value in weights.items() if name != router},
        "has more, which its config.json does not describe": weights | {"more": torch.zeros(1)},
        "is [3, 32]": weights | {router: torch.zeros(3, 32)},
        "final_norm.bias is NaN or infinite": weights | {"model.final_norm.bias": torch.full((32,), torch.nan)},
    }.items():
        save_file(tensors, folder / "model.safetensors")
        assert message in error_of(capsys, "import", folder, out)
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert "cannot be read" in error_of(capsys, "import", folder, out)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type=bert" in error_of(capsys, "import", folder, out)
    (folder / "config.json").unlink()
    assert "no config.json" in error_of(capsys, "import", folder, out)
    assert not out.exists()


def gpt2(folder: Path, **settings: object) -> GPT2LMHeadModel:
    values = {"vocab_size": 67, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}
    values |= {"bos_token_id": 0, "eos_token_id": 0, "layer_norm_epsilon": 1e-4}
    model = GPT2LMHeadModel(GPT2Config(**values | settings)).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("inner", [None, 80])
def test_gpt2_computes_what_it_did(inner: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = gpt2(tmp_path / "gpt2", n_inner=inner)
    main(["import", str(tmp_path / "gpt2"), str(tmp_path / "gpt2.ckpt")])
    assert "has no tokenizer.json" in capsys.readouterr().out
    ours = load_model(tmp_path / "gpt2.ckpt")
    assert (ours.config.hidden_dropout, ours.config.moe) == (0.1, None)
    tokens = torch.randint(67, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(
            ours.logits(ours(tokens).hidden), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
        )


def test_a_gpt2_with_other_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2(tmp_path / "gpt2", n_layer=1)
    weights = load_file(tmp_path / "gpt2/model.safetensors") | {"transformer.h.0.mlp.extra": torch.ones(1)}
    save_file(weights, tmp_path / "gpt2/model.safetensors", {"format": "pt"})
    assert "has transformer.h.0.mlp.extra" in error_of(capsys, "import", tmp_path / "gpt2", tmp_path / "o.ckpt")


def test_the_model_card_has_the_numbers_of_the_run_that_ended_with_the_checkpoint(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoints["moe"], run / "checkpoints/step-2.ckpt")
    tokens = json.loads((checkpoints["moe"] / "checkpoint.json").read_text())["tokens_seen"]
    size = count_parameters(load_model(checkpoints["moe"]).config).total

    def card(tokens: int, size: int) -> str:
        summary = {"val_loss": 3.14159, "bits_per_byte": {"all": 2.5, "code": 1.5, "own": None}}
        (run / "summary.json").write_text(json.dumps(summary | {"tokens": tokens, "params_total": size}))
        main(["export", str(run), str(tmp_path / f"exported-{tokens}-{size}")])
        return (tmp_path / f"exported-{tokens}-{size}/README.md").read_text()

    own, other, pruned = card(tokens, size), card(tokens + 1, size), card(tokens, size + 1)
    assert "| last validation of its run | 3.142 nats per token |\n| bits per byte of validation text | 2.50 |" in own
    assert "| bits per byte, code | 1.50 |" in own and "own" not in own.partition("---")[2].partition("The model's")[0]
    assert "validation" not in other and "validation" not in pruned
