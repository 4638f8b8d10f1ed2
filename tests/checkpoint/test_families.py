"""Families of `transformers`: places of tensors in both directions, the choice of a family, and what an import leaves out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from nlgmoe import MoEGPTModule, WarmStart
from nlgmoe.checkpoint.reading import read_document
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.surgery.prune import prune
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.hugging_face.families import FAMILIES, family_of
from nlgmoe.tools.hugging_face.importing import import_model
from tests.support.synthetic import SyntheticData
from tests.support.trainers import SaveAt, trainer

CONFIG = GPTConfig(
    61, 16, 2, 32, 4, ffn_hidden_size=24, num_kv_heads=2, norm="rmsnorm", rope_theta=100.0, bias=False, ffn_network="swiglu",
    tied_embeddings=False, moe=MoEConfig(4, expert_interval=1, top_k=2),
)  # fmt: skip


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a model that two families compute, imported from the second."""
    monkeypatch.setitem(FAMILIES, "twin", replace(FAMILIES["mixtral"], name="twin"))
    values = FAMILIES["mixtral"].settings(CONFIG)
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**values)).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "twin"}))
    assert import_model(str(tmp_path / "theirs"), tmp_path / "twin.ckpt").model_type == "twin"
    return tmp_path / "twin.ckpt"


def test_the_family_of_an_import_is_preferred(imported: Path, tmp_path: Path) -> None:
    assert (family_of(CONFIG), family_of(CONFIG, "twin")) == (("mixtral", ""), ("twin", ""))
    assert family_of(CONFIG, "llama") == family_of(CONFIG, "of another nlgmoe") == ("mixtral", "")
    assert export(imported, tmp_path / "back").family == "twin"

    prune(imported, tmp_path / "pruned.ckpt", [3, 3], [[0, 1, 3]] * 2)
    assert export(tmp_path / "pruned.ckpt", tmp_path / "pruned").family == "twin"

    save, start = SaveAt(1, tmp_path / "run.ckpt"), WarmStart(str(imported))
    trainer(tmp_path / "run", save, max_steps=1).fit(MoEGPTModule(CONFIG, warm_start=start), SyntheticData())
    save = SaveAt(2, tmp_path / "resumed.ckpt")
    run = trainer(tmp_path / "run", save, max_steps=2)
    run.fit(MoEGPTModule(CONFIG), SyntheticData(), ckpt_path=tmp_path / "run.ckpt")
    assert read_document(tmp_path / "resumed.ckpt")["family"] == "twin"


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


def test_quantised_files_are_refused_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    config.save_pretrained(folder)
    for kind, dtype in {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}.items():  # MXFP4 is of bytes
        weights = {"model.norm.weight": torch.zeros(32, dtype=dtype)}
        save_file(weights, folder / "model.safetensors")
        message = f"model.norm.weight is of {kind}, and nlgmoe reads no quantised files; name a conversion to bf16"
        with pytest.raises(ValueError, match=message):
            import_model(str(folder), tmp_path / "made.ckpt")
