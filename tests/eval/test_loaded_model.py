"""A checkpoint contains its tokenizer, and is loaded with it from any folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nlgmoe import GPTConfig, MixtureOfStudents, MoEConfig, MoEGPTModule, WarmStart, generate, load_pretrained
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import choose_checkpoint
from nlgmoe.data.tokenizer import PROBE, Tokenizer
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe
from nlgmoe.surgery.write_weights import write_weights
from nlgmoe.tools.hugging_face.export import export
from tests.support.checkpoints import TOKENIZER, write
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer

OTHER = Tokenizer(train_byte_level_bpe(iter(["THE KING AND THE QUEEN"] * 3), 300), "other")
CONFIG = GPTConfig(TOKENIZER.vocab_size, 16, 2, 16, 2, moe=MoEConfig(4))


class WithTokenizer(SyntheticData):
    tokenizer = TOKENIZER


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder, max_steps=1)
    run.fit(MoEGPTModule(CONFIG), WithTokenizer())
    run.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_loaded_model_brings_its_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints/step-1.ckpt"
    shutil.copytree(checkpoint, saved)
    for path in (saved, tmp_path):  # a checkpoint, or a run folder
        loaded = load_pretrained(path)
        assert loaded.path == saved
        assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
        assert loaded.tokenizer.encode(PROBE) == TOKENIZER.encode(PROBE)
        ids = generate(loaded.model, [loaded.tokenizer.encode("the ki")], 4)
        assert loaded.tokenizer.decode(ids[0]).startswith("the ki")
    assert load_pretrained(checkpoint, precision="bf16").model.unembedding.dtype == torch.bfloat16


def test_loaded_model_finds_a_damaged_or_missing_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints/step-1.ckpt"
    shutil.copytree(checkpoint, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("king", "knig", 1))
    for damage in (lambda: None, file.unlink):
        damage()
        with pytest.raises(ValueError, match=r"tokenizer\.json.*use another checkpoint"):
            load_pretrained(folder)
        with pytest.raises(ValueError, match="no valid checkpoint"):
            choose_checkpoint(tmp_path)


def test_loaded_model_without_a_tokenizer_needs_one(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", GPTConfig(260, 16, 2, 16, 2))
    with pytest.raises(ValueError, match=r"tokenizer=null: .* holds none; set it"):
        load_pretrained(tmp_path / "a.ckpt")
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.files["tokenizer.json"])
    assert load_pretrained(checkpoint, str(tmp_path)).tokenizer.fingerprint == TOKENIZER.fingerprint
    with pytest.raises(ValueError, match=f"has {TOKENIZER.vocab_size} ids, the model 260"):
        load_pretrained(tmp_path / "a.ckpt", str(tmp_path))


def test_loaded_model_refuses_another_tokenizer_of_the_same_size(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By whatever takes a tokenizer beside a checkpoint; a warm start that is not strict loads the weights and says so."""
    assert OTHER.vocab_size == TOKENIZER.vocab_size
    (tmp_path / "tokenizer.json").write_text(OTHER.files["tokenizer.json"])
    weights = tmp_path / "weights.ckpt"
    write_weights(weights, Checkpoint(checkpoint).tensors("model").read, CONFIG, TOKENIZER.files)
    own, other = WithTokenizer(), WithTokenizer()
    other.tokenizer = OTHER

    def validate(data: SyntheticData, module: MoEGPTModule, **options: Any) -> None:
        trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False, **options)

    def warm_start(**options: Any) -> MoEGPTModule:
        return MoEGPTModule(CONFIG, warm_start=WarmStart(str(checkpoint), **options))

    def distil() -> None:
        module = MoEGPTModule(CONFIG, distiller=MixtureOfStudents(str(weights)))
        trainer(tmp_path, max_steps=1).fit(module, other)

    validate(own, warm_start())
    validate(own, MoEGPTModule(CONFIG), ckpt_path=weights)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: load_pretrained(checkpoint, str(tmp_path)), f"tokenizer={tmp_path} differs from the tokenizer that"),
        (lambda: load_pretrained(checkpoint, precision="bfloat16"), "precision=bfloat16 must be fp32, bf16 or null"),
        (lambda: export(checkpoint, tmp_path / "exported", tokenizer=OTHER), "tokenizer=other differs from the"),
        (lambda: validate(other, warm_start()), r"token_embedding.weight .of another tokenizer than data.tokenizer"),
        (lambda: validate(other, MoEGPTModule(CONFIG), ckpt_path=weights), "weights.ckpt has another tokenizer than"),
        (distil, "weights.ckpt has another tokenizer than data.tokenizer; use a teacher with"),
    ]
    for action, message in refused:
        with pytest.raises(ValueError, match=message):
            action()
    with caplog.at_level("INFO"):
        validate(other, warm_start(strict=False))
    assert "token_embedding.weight (of another tokenizer than data.tokenizer)" in caplog.text
