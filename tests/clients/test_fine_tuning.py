"""PEFT and TRL on an export with our code and on a family's."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nlgmoe import load_model
from nlgmoe.config import MoEConfig
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.hugging_face.importing import import_model
from tests.support.checkpoints import PR_MOE, TOKENIZER, write

MODELS = {
    "pr_moe": replace(PR_MOE, seq_len=64),
    "mixtral": replace(
        PR_MOE, seq_len=64, norm="rmsnorm", rope_theta=1e4, bias=False, ffn_network="swiglu", tied_embeddings=False,
        moe=MoEConfig(4, expert_interval=1, top_k=2, token_dropping=False),
    ),
}  # fmt: skip
TEXTS = ["the king", "the queen and the king", "and the queen", "the king and the queen and the king and the queen"] * 4
TARGETS = {"pr_moe": ["qkv", "output"], "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"]}
LINEAR = {"pr_moe": {"qkv", "output", "up", "down", "coefficient"}, "mixtral": {*TARGETS["mixtral"], "gate", "experts"}}
EXPERTS = {"pr_moe": ["experts.up_weight", "experts.down_weight"], "mixtral": ["experts.gate_up_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name, config in MODELS.items():
        write(root / f"{name}.ckpt", config, tokenizer=TOKENIZER.files)
        export(root / f"{name}.ckpt", root / name)
    return {name: root / name for name in MODELS}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def batch(rows: int = 4) -> Tensor:
    return torch.randint(TOKENIZER.vocab_size, (rows, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, length: int | None = None) -> Tensor:
    result: Tensor = model.eval()(input_ids=batch(2)[:, :length]).logits
    return result


@pytest.mark.parametrize("target", ["all-linear", "experts"])
@pytest.mark.parametrize("name", MODELS)
def test_lora_trains_merges_and_is_imported(name: str, target: str, folders: dict[str, Path], tmp_path: Path) -> None:
    targets, expected = {
        "all-linear": ({"target_modules": "all-linear"}, LINEAR[name]),
        "experts": ({"target_modules": TARGETS[name], "target_parameters": EXPERTS[name]}, {*TARGETS[name], "experts"}),
    }[target]
    model = peft.get_peft_model(load(folders[name]), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **targets))
    before, learning = logits(model), {n: p for n, p in model.named_parameters() if p.requires_grad}
    reached = {each.split(".lora_")[0].removesuffix(".base_layer").rpartition(".")[2] for each in learning}
    assert reached == expected
    optimizer, losses = torch.optim.AdamW(learning.values(), lr=1e-2), []
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        assert all(p.grad is not None for p in learning.values())
        optimizer.step()
        losses.append(float(loss))
    assert all(p.grad.any() for p in learning.values())
    after = logits(model)
    assert losses[-1] < losses[0] and (after - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, 2), after[:, :2], rtol=0, atol=1e-5)  # few rows, as in generation

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folders[name]), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), after, rtol=0, atol=1e-6)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=0, atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    import_model(str(tmp_path / "merged"), tmp_path / "merged.ckpt")
    ours = load_model(tmp_path / "merged.ckpt").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(batch(2)).hidden), after, rtol=0, atol=2e-5)


def test_trl_trains_an_export_on_packed_documents(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = trl.SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, max_length=32,
        packing=True, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
        router_aux_loss_coef=0.0,  # TRL's own loss needs equal numbers of experts
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        load(folders["pr_moe"]),
        settings,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(folders["pr_moe"]),
    )
    # Each document has the logits that it has alone.
    packed, model = next(iter(trainer.get_train_dataloader())), trainer.model.eval()
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    with torch.no_grad():
        given = {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"]}
        parts = model(**given).logits.tensor_split(starts[1:], dim=1)
        for ids, together in zip(packed["input_ids"].tensor_split(starts[1:], dim=1), parts, strict=True):
            torch.testing.assert_close(together, model(input_ids=ids).logits, rtol=0, atol=2e-5)
    before = {each: value.clone() for each, value in trainer.model.named_parameters()}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert not any(torch.equal(value, before[each]) for each, value in trainer.model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_docs_example_of_fine_tuning_writes_a_model_that_is_imported(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/open_moes.md").read_text()
    code = re.search(r"## Fine-tune an export .*?```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "exported").symlink_to(folders[name])
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    monkeypatch.chdir(tmp_path)
    exec(code[1].replace("max_steps=20", "max_steps=2"), {})
    import_model("tuned", tmp_path / "tuned.ckpt")
    before, after = (load_model(path) for path in (folders[name].with_suffix(".ckpt"), tmp_path / "tuned.ckpt"))
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert after.config.moe is not None and not all(torch.equal(old, new) for old, new in pairs)
