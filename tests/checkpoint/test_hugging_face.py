"""Exported folders work without this project, and come back bit for bit; dense models become mixtures."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, MixtralConfig, MixtralForCausalLM

from nlgmoe import MLAConfig, MoEGPTModule, WarmStart, Yarn, generate, load_model
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.tokenizer import PROBE
from nlgmoe.data.tokenizer_loading import load_tokenizer
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.layers.router import Router
from nlgmoe.surgery import write_weights
from nlgmoe.surgery.prune import prune
from nlgmoe.tools.hugging_face import importing
from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.hugging_face.families import FAMILIES, family_of
from nlgmoe.tools.hugging_face.importing import import_model
from nlgmoe.tools.hugging_face.modeling_nlgmoe import NlgmoeForCausalLM
from tests.support.checkpoints import PR_MOE, TOKENIZER, write
from tests.support.commands import error_of
from tests.support.synthetic import SyntheticData
from tests.support.trainers import SaveAt, trainer

CONFIGS = {
    "moe": GPTConfig(
        TOKENIZER.vocab_size, 24, 2, 32, 2, hidden_dropout=0.1,
        moe=MoEConfig(4, top_k=2, gate_scale=2.0, normalize_weights=False),
    ),
    "pr_moe": PR_MOE,
    "dense": GPTConfig(TOKENIZER.vocab_size, 24, 2, 32, 2, ffn_hidden_size=48),
    "modern": replace(  # no family has a pyramid
        PR_MOE, norm="rmsnorm", rope_theta=1e4, qk_norm="head", num_kv_heads=1, bias=False, ffn_network="swiglu",
        tied_embeddings=False,
    ),
    "latent": replace(  # parts of the package that config.json names
        PR_MOE, norm="rmsnorm", rope_theta=100.0, bias=False, ffn_network="swiglu", tied_embeddings=False,
        attention=MLAConfig(8, 4, 4, 8, q_lora_rank=12), rotary_scaling=Yarn(4.0, 8), attention_scale=0.5,
        embedding_scale=2.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {n: write(folder / f"{n}.ckpt", c, tokenizer=TOKENIZER.files) for n, c in CONFIGS.items()}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("folders")
    for name, checkpoint in checkpoints.items():
        main(["export", str(checkpoint), str(folder / name)])
    return {name: folder / name for name in checkpoints}


def test_export_writes_bf16_on_request_and_keeps_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    main(["export", str(checkpoints["moe"]), str(tmp_path / "half"), "--precision", "bf16"])
    main(["import", str(tmp_path / "half"), str(tmp_path / "half.ckpt")])
    main(["export", str(tmp_path / "half.ckpt"), str(tmp_path / "again")])
    half, again = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "again"))
    whole = load_model(checkpoints["moe"]).state_dict()
    whole["token_embedding.weight"] = whole["token_embedding.weight"][: TOKENIZER.vocab_size]  # without padding rows
    assert all(torch.equal(half["model.gpt." + name], value.to(torch.bfloat16)) for name, value in whole.items())
    assert all(again[name].dtype == torch.bfloat16 and torch.equal(again[name], value) for name, value in half.items())
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"


def test_exported_tokenizer_gives_our_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folders["moe"], trust_remote_code=True)
    assert theirs(PROBE, split_special_tokens=True).input_ids == TOKENIZER.encode(PROBE)
    assert theirs.decode(TOKENIZER.encode(PROBE)) == PROBE
    assert theirs("a<|endoftext|>").input_ids == [*TOKENIZER.encode("a"), TOKENIZER.eod_id]
    assert (theirs.eos_token_id, theirs.model_max_length, theirs.padding_side) == (TOKENIZER.eod_id, 24, "left")
    theirs(["the king and the queen"], truncation=True, max_length=3)  # leaves its mark in what is saved
    theirs.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), tmp_path).encode(PROBE) == TOKENIZER.encode(PROBE)


def test_card_pads_prompts_also_if_the_tokenizer_names_no_token_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {"config.json": {"eos_token_id": TOKENIZER.eod_id}, "tokenizer_config.json": {"model_max_length": 24}}
    files = TOKENIZER.files | {name: json.dumps(values) for name, values in beside.items()}
    export(write(tmp_path / "named.ckpt", CONFIGS["moe"], tokenizer=files), tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    values = {"AutoTokenizer": AutoTokenizer}
    for line in (tmp_path / "exported/README.md").read_text().splitlines():
        if line.startswith(("tokenizer = ", "prompts = ")):
            exec(line, values)
    assert values["prompts"].input_ids[0, 0] == TOKENIZER.eod_id


def test_export_works_where_only_transformers_is_installed(
    checkpoints: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    names = ("pr_moe", "modern", "latent")
    copies = [str(shutil.copytree(folders[name], tmp_path / name)) for name in names]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(Path(__file__).with_name("load_alone.py")), *copies]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, env=environment, cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    tokens = torch.arange(24).view(2, 12)
    for name, folder in zip(names, copies, strict=True):
        theirs, model = results[folder], load_model(checkpoints[name])
        with torch.no_grad():
            assert torch.equal(torch.tensor(theirs["logits"]), model.logits(model(tokens).hidden))
        for prompt, new in zip(theirs["prompts"], theirs["greedy"], strict=True):
            ids = TOKENIZER.encode(prompt)
            assert generate(model, [ids], 8, temperature=0)[0] == ids + new
        assert theirs["uncached"] == theirs["greedy"]


@pytest.mark.parametrize("name", CONFIGS)
def test_export_is_imported_bit_for_bit(
    name: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["export", str(checkpoints[name]), str(tmp_path / "folder"), "--max-shard-size", "40KB"])
    index = json.loads((tmp_path / "folder/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in (tmp_path / "folder").glob("*.safetensors")) and len(files) >= 3
    (tmp_path / "folder/modeling_nlgmoe.py").write_text("raise AssertionError('the code of a folder is run')")
    monkeypatch.setattr(write_weights, "SHARD_VALUES", 3000)
    main(["import", str(tmp_path / "folder"), str(tmp_path / "back.ckpt")])
    assert len(list((tmp_path / "back.ckpt").glob("model-*.safetensors"))) >= 3
    modes = [{file.stat().st_mode for file in (tmp_path / name).iterdir()} for name in ("folder", "back.ckpt")]
    assert modes[0] == modes[1] and len(modes[0]) == 1  # weights have those of other files
    assert list(find_problems(Checkpoint(tmp_path / "back.ckpt"))) == []
    original, back = (
        Checkpoint(path).tensors("model").read_all() for path in (checkpoints[name], tmp_path / "back.ckpt")
    )
    for entry in original.keys() & {"token_embedding.weight", "head.weight"}:
        original[entry][TOKENIZER.vocab_size :] = 0  # padding, which an exported folder does not have
    assert original.keys() == back.keys() and all(torch.equal(original[entry], back[entry]) for entry in original)
    assert Checkpoint(tmp_path / "back.ckpt").document["model_config"] == CONFIGS[name].to_dict()
    files = Checkpoint(tmp_path / "back.ckpt").tokenizer()
    assert files is not None and files.items() >= TOKENIZER.files.items()
    kept = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert all(files[name] == (tmp_path / "folder" / name).read_text() for name in kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.ckpt", "back.yaml", "folder"]


@pytest.mark.parametrize("name", ["pr_moe", "dense"])
def test_export_has_the_losses_of_our_training(name: str, folders: dict[str, Path]) -> None:
    model = NlgmoeForCausalLM.from_pretrained(folders[name])
    tokens = torch.randint(TOKENIZER.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100)
    ours, targets = model.model.gpt, labels[:, 1:].flatten()

    def language(hidden: torch.Tensor) -> torch.Tensor:
        rows, counted = hidden[:, :-1].flatten(0, 1), targets != -100
        return cross_entropy(rows, ours.unembedding, ours.config.vocab_size, targets.clamp_min(0), counted, 10)

    torch.testing.assert_close(model(tokens, labels=labels).loss, language(ours(tokens).hidden), rtol=1e-6, atol=0)
    model.train()
    torch.manual_seed(0)  # of the tokens that are kept
    output = ours(tokens)
    expected = language(output.hidden)
    if output.routings:
        balance, z = router_losses(output.routings)
        expected = expected + 0.1 * balance + 0.2 * z
    weights = list(model.parameters())
    gradients = torch.autograd.grad(expected, weights)
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        loss = model(tokens, labels=labels).loss
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, weights), gradients)


def test_export_has_a_finite_loss_without_z_loss_where_its_logits_overflow() -> None:
    moe = {"num_experts": 4, "expert_interval": 1, "z_loss_coeff": 0.0}
    model = NlgmoeForCausalLM(NlgmoeConfig(vocab_size=64, seq_len=8, num_layers=1, hidden_size=8, num_heads=2, moe=moe))
    with torch.no_grad():
        next(part for part in model.modules() if isinstance(part, Router)).weight.normal_(std=1e25)  # squared: infinite
    tokens = torch.arange(8)[None]
    assert bool(model.train()(tokens, labels=tokens).loss.isfinite())


def test_export_and_import_refuse_damage_and_write_nothing(
    checkpoints: dict[str, Path], folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert "exists and is not an empty folder" in error_of(capsys, "export", checkpoints["moe"], tmp_path / "full")
    damaged, folder = tmp_path / "damaged.ckpt", tmp_path / "folder"
    shutil.copytree(checkpoints["moe"], damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    assert "is damaged" in error_of(capsys, "export", damaged, tmp_path / "new")
    shutil.copytree(folders["moe"], folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.gpt.final_norm.bias": torch.full((32,), torch.nan)}, folder / "model.safetensors")
    assert "final_norm.bias is NaN or infinite" in error_of(capsys, "import", folder, tmp_path / "new.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.ckpt", "folder", "full"]


# ---- the family of an import and of an export

MIXTRAL = GPTConfig(
    61, 16, 2, 32, 4, ffn_hidden_size=24, num_kv_heads=2, norm="rmsnorm", rope_theta=100.0, bias=False, ffn_network="swiglu",
    tied_embeddings=False, moe=MoEConfig(4, expert_interval=1, top_k=2),
)  # fmt: skip


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a model that two families compute, imported from the second."""
    monkeypatch.setitem(FAMILIES, "twin", replace(FAMILIES["mixtral"], name="twin"))
    values = FAMILIES["mixtral"].settings(MIXTRAL)
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**values)).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "twin"}))
    assert import_model(str(tmp_path / "theirs"), tmp_path / "twin.ckpt").model_type == "twin"
    return tmp_path / "twin.ckpt"


def test_the_family_of_an_import_is_preferred(imported: Path, tmp_path: Path) -> None:
    assert (family_of(MIXTRAL), family_of(MIXTRAL, "twin")) == (("mixtral", ""), ("twin", ""))
    assert family_of(MIXTRAL, "llama") == family_of(MIXTRAL, "of another nlgmoe") == ("mixtral", "")
    assert export(imported, tmp_path / "back").family == "twin"

    prune(imported, tmp_path / "pruned.ckpt", [3, 3], [[0, 1, 3]] * 2)
    assert export(tmp_path / "pruned.ckpt", tmp_path / "pruned").family == "twin"

    save, start = SaveAt(1, tmp_path / "run.ckpt"), WarmStart(str(imported))
    trainer(tmp_path / "run", save, max_steps=1).fit(MoEGPTModule(MIXTRAL, warm_start=start), SyntheticData())
    save = SaveAt(2, tmp_path / "resumed.ckpt")
    run = trainer(tmp_path / "run", save, max_steps=2)
    run.fit(MoEGPTModule(MIXTRAL), SyntheticData(), ckpt_path=tmp_path / "run.ckpt")
    assert Checkpoint(tmp_path / "resumed.ckpt").document["family"] == "twin"


def test_family_of_an_export_is_chosen_by_name(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(imported), str(tmp_path / "mixtral"), "--family", "mixtral"])
    assert "in the format of mixtral" in capsys.readouterr().out
    main(["export", str(imported), str(tmp_path / "own"), "--family", "nlgmoe"])
    assert "with the model's code: load it with trust_remote_code=True" in capsys.readouterr().out
    for name, words in {
        "olmoe": r"family=olmoe does not compute a model with qk_norm=null; leave it out, or use nlgmoe",
        "llama": r"family=llama does not compute a model with num_experts=4; ",
        "gpt2": r"family=gpt2 cannot be exported; supported are nlgmoe, olmoe, .*twin",
        "gemma": r"family=gemma cannot be exported; supported are nlgmoe, olmoe, .*twin",
    }.items():
        with pytest.raises(ValueError, match=words):
            export(imported, tmp_path / "refused", family=name)
    assert not (tmp_path / "refused").exists()


def test_models_of_the_hub_are_refused_before_their_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded: list[list[str]] = []

    def download(source: str, allow_patterns: list[str]) -> str:
        downloaded.append(allow_patterns)
        return str(tmp_path)

    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    monkeypatch.setattr(importing, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"model_type=gemma of .* cannot be imported; supported are nlgmoe .*mixtral"):
        import_model("google/gemma", tmp_path / "made.ckpt")
    assert downloaded == [["config.json"]]


def test_quantised_files_are_refused_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    config = LlamaConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    config.save_pretrained(folder)
    for kind, dtype in {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}.items():  # MXFP4 is of bytes
        weights = {"model.norm.weight": torch.zeros(32, dtype=dtype)}
        save_file(weights, folder / "model.safetensors")
        message = f"model.norm.weight is of {kind}, and nlgmoe reads no quantised files; name a conversion to bf16"
        with pytest.raises(ValueError, match=message):
            import_model(str(folder), tmp_path / "made.ckpt")
