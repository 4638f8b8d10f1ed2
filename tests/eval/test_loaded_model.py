"""A checkpoint holds its tokenizer, and is loaded with it wherever it lies."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule, generate, load_pretrained
from nlgmoe.checkpoint.folder import read_tokenizer
from nlgmoe.checkpoint.newest import choose
from nlgmoe.checkpoint.verify import problems
from nlgmoe.data.tokenizer import PROBE, Tokenizer, train_byte_level_bpe
from tests.synthetic import SyntheticData

TOKENIZER = Tokenizer(train_byte_level_bpe(iter(["the king and the queen"] * 3), 300), "tiny")
CONFIG = GPTConfig(TOKENIZER.vocab_size, 16, 2, 16, 2, moe=MoEConfig(4))


class WithTokenizer(SyntheticData):
    def tokenizer_json(self) -> str:
        return TOKENIZER.to_json()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=folder, max_steps=1, max_epochs=-1, accelerator="cpu", logger=False, **settings)
    trainer.fit(MoEGPTModule(CONFIG), WithTokenizer())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_model_and_tokenizer_come_back_together(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere.ckpt")
    for path in (tmp_path / "elsewhere.ckpt", tmp_path):  # a checkpoint, or a folder of them
        loaded = load_pretrained(path)
        assert loaded.path == tmp_path / "elsewhere.ckpt"
        assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
        assert loaded.tokenizer.encode(PROBE) == TOKENIZER.encode(PROBE)
        ids = generate(loaded.model, [loaded.tokenizer.encode("the ki")], 4)
        assert loaded.tokenizer.decode(ids[0]).startswith("the ki")
    assert load_pretrained(checkpoint, precision="bf16").model.unembedding.dtype == torch.bfloat16


def test_a_damaged_or_missing_tokenizer_is_found(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a.ckpt"
    shutil.copytree(checkpoint, folder)
    assert list(problems(folder)) == []
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("king", "knig", 1) + " ")
    for damage in (lambda: None, file.unlink):
        damage()
        found = list(problems(folder))
        assert len(found) == 1 and "tokenizer.json" in found[0]
        with pytest.raises(ValueError, match=r"tokenizer\.json.*use another checkpoint"):
            load_pretrained(folder)
        with pytest.raises(ValueError, match="no valid checkpoint"):
            choose(tmp_path)


def test_without_one_it_has_to_be_given(checkpoint: Path, tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, max_epochs=-1, accelerator="cpu", logger=False)
    trainer.fit(MoEGPTModule(GPTConfig(260, 16, 2, 16, 2)), SyntheticData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert read_tokenizer(tmp_path / "a.ckpt") is None
    with pytest.raises(ValueError, match=r"tokenizer=null: .* holds none; set it"):
        load_pretrained(tmp_path / "a.ckpt")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/tokenizer.json").write_text(TOKENIZER.to_json())
    assert load_pretrained(checkpoint, str(tmp_path / "tiny")).tokenizer.fingerprint == TOKENIZER.fingerprint
    with pytest.raises(ValueError, match=f"has {TOKENIZER.vocab_size} ids, the model 260"):
        load_pretrained(tmp_path / "a.ckpt", str(tmp_path / "tiny"))
