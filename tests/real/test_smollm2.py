"""Commands of docs/real_model.md on the cut; tests/benchmarks/test_real_model.py takes the whole path."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nlgmoe import load_model, load_pretrained
from nlgmoe.commands.main import main
from nlgmoe.data.tokenizer import detokenize
from tests.real import CUT

QUESTION = "What is 12?"
TEXT = "The king said that in 1984 it's 12 metres, and he went to the house.\n" * 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cut")
    main(["import", str(CUT), str(path / "cut.ckpt")])
    (path / "text.txt").write_text(TEXT)
    return path


@torch.no_grad()
def test_a_chat_ends_where_transformers_ends_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", str(folder / "cut.ckpt"), f"--prompt={QUESTION}", "--chat", "--temperature=0"])
    answer = capsys.readouterr().out
    main(["export", str(folder / "cut.ckpt"), str(folder / "exported")])
    tokenizer, theirs = (each.from_pretrained(folder / "exported") for each in (AutoTokenizer, AutoModelForCausalLM))
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    made = theirs.generate(ids, max_new_tokens=100, do_sample=False)[0, ids.shape[1] :].tolist()
    assert answer == detokenize(load_pretrained(folder / "cut.ckpt").tokenizer, made) + "\n"
    assert tokenizer.decode(ids[0]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert load_pretrained(folder / "cut.ckpt").tokenizer.stop_ids == {0, 2}
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.config.max_position_embeddings == 8192
    assert [getattr(theirs.generation_config, f"{name}_token_id") for name in ("bos", "eos", "pad")] == [1, 2, 2]


@torch.no_grad()
def test_upcycled_smollm2_has_the_dense_loss(folder: Path) -> None:
    main(["upcycle", str(folder / "cut.ckpt"), str(folder / "moe.ckpt"), "--num-experts=4"])
    dense, moe = (load_model(folder / name) for name in ("cut.ckpt", "moe.ckpt"))
    ids = torch.tensor([load_pretrained(folder / "cut.ckpt").tokenizer.encode(TEXT)[:200]])
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        for model in (dense, moe):
            logits = model.to(dtype).logits(model(ids).hidden)[0, :-1].float()
            losses.append(float(F.cross_entropy(logits, ids[0, 1:])))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # 20.45 nats: 1e-6 is less than a rounding step of fp32
    assert losses[3] == pytest.approx(losses[2], abs=1e-3 * losses[2])
    main(["export", str(folder / "moe.ckpt"), str(folder / "exported_moe")])
    assert json.loads((folder / "exported_moe/config.json").read_text())["model_type"] == "mixtral"


def test_student_of_smollm2_keeps_the_blocks_that_matter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = folder / "student.yaml"
    options = [f"--text={folder / 'text.txt'}", "--windows=1", f"--output={student}"]
    main(["student", str(folder / "cut.ckpt"), "--num-layers=3", *options])
    assert "influence" in capsys.readouterr().out and "num_layers: 3" in student.read_text()
