"""Routers and experts in a user's own files: trained, resumed, read, and refused where they are not known."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cosine_router import CosineRouterConfig
from hash_router import HashRouterConfig
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from line_corpus import LineCorpus
from swiglu_expert import SwiGLUExpert
from torch.nn import functional as F

from nlgmoe import (
    GPT,
    GPTConfig,
    MoEConfig,
    MoEGPTModule,
    Router,
    RouterConfig,
    Routing,
    RoutingContext,
    SigmoidTopK,
    SoftmaxTopK,
)
from nlgmoe.checkpoint.folder import TensorFiles, read_document
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.cli.train import main
from nlgmoe.commands.main import main as nlgmoe
from nlgmoe.data import TokenArrays, load_tokenizer
from nlgmoe.layers import contract
from nlgmoe.layers.balance import router_losses
from nlgmoe.model.counting import count_parameters, parameters_of
from nlgmoe.non_finite import NonFinite
from nlgmoe.step import Window
from tests.end_to_end.test_train_cli import ROOT, TINY
from tests.processes import python
from tests.synthetic import SyntheticData

HASH = {"class_path": "hash_router.HashRouterConfig", "init_args": {"seed": 1}}
SWIGLU = {"class_path": "swiglu_expert.SwiGLUExpert", "init_args": {"multiple": 8}}
SILENT = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
CONFIG = GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4, router=HashRouterConfig(1), expert=SwiGLUExpert(8)))


def command(folder: Path, data: Path, *settings: str) -> list[str]:
    """Train a tiny model with the router and the expert of docs/examples."""
    parts = folder.parent / "parts.yaml"
    parts.write_text(yaml.safe_dump({"model": {"config": {"moe": {"router": HASH, "expert": SWIGLU, "top_k": 1}}}}))
    words = ["fit", "--config", str(ROOT / "configs/moe/laptop.yaml"), *TINY, "--config", str(parts)]
    words += [f"--data.data_dir={data}", f"--trainer.default_root_dir={folder}", *settings]
    return [*words, "--trainer.log_every_n_steps=2", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def whole(pocket_pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending") / "whole"
    main(command(folder, pocket_pile, "--model.train_tokens=256"))
    return folder


def test_a_run_is_trained_and_resumed_and_its_checkpoint_holds_the_buffers(
    whole: Path, pocket_pile: Path, tmp_path: Path
) -> None:
    halves = tmp_path / "halves"
    main(command(halves, pocket_pile, "--model.train_tokens=128"))
    main(command(halves, pocket_pile, "--model.train_tokens=256", "--ckpt_path=last"))
    ends = [TensorFiles(run / "checkpoints/last.ckpt", "model").read_all() for run in (whole, halves)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    buffer = ends[0]["blocks.1.moe.router.table"]
    assert buffer.dtype == torch.int64 and buffer.any()
    assert "blocks.1.moe.experts.0.gate_weight" in ends[0]
    document = read_document(whole / "checkpoints/last.ckpt")
    assert document["model_config"]["moe"]["router"] == HASH and document["model_config"]["moe"]["expert"] == SWIGLU
    assert not list(find_problems(whole / "checkpoints/last.ckpt"))
    columns = (whole / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "experts/0/load_cv" in columns and "experts/0/entropy" not in columns  # it has no probabilities
    with pytest.raises(SystemExit), pytest.raises(ValueError, match="holds the paper's router alone, not"):
        nlgmoe(["export", str(whole), str(tmp_path / "export")])


def test_commands_import_what_they_are_allowed_to(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", str(whole), "--prompt", "The", "--max-new-tokens", "2"]
    allowed = ["--allow-code", "hash_router", "--allow-code", "swiglu_expert"]
    done = python("-m", "nlgmoe", *generate, *allowed, cwd=ROOT / "docs/examples")
    assert done.returncode == 0 and done.stderr.startswith("newest checkpoint: ") and done.stderr.count("\n") == 1

    monkeypatch.delitem(sys.modules, "hash_router")
    capsys.readouterr()
    nlgmoe(["verify", str(whole / "checkpoints/last.ckpt")])
    assert "moe.router=hash_router.HashRouterConfig" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        nlgmoe(generate)
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: the checkpoint's model has hash_router.HashRouterConfig, code outside nlgmoe that is not imported; "
        "add --allow-code hash_router, if you trust it"
    )


def test_a_file_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "unwritten.py").write_text("def (\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = "unwritten.X: cannot import unwritten (SyntaxError: invalid syntax (unwritten.py, line 1)); put its file"
    fit = ["fit", f"--config={ROOT}/configs/moe/laptop.yaml", "--model.config.moe.router=unwritten.X"]
    for function, words in ((main, fit), (nlgmoe, ["check", "unwritten.X"])):
        with pytest.raises(SystemExit) as end:
            function(words)
        assert (end.value.code, message in capsys.readouterr().err) == (2, True)


def test_a_router_reads_the_settings_that_it_names_and_chooses_top_k_experts() -> None:
    MoEConfig(4, loss_coeff=0.5, router=SoftmaxTopK())
    with pytest.raises(ValueError, match=r"HashRouter returned expert of \[32, 1\], not \[tokens, top_k\] = \[32, 2\]"):
        GPT(replace(CONFIG, moe=MoEConfig(4, top_k=2, router=HashRouterConfig())))(torch.zeros(2, 16, dtype=torch.long))


def test_a_router_says_correctly_what_it_reads() -> None:
    for uses, message in (
        (frozenset({"loss_coef"}), "Wrong.uses names loss_coef; a router may use aux_scope, eval_capacity_factor"),
        (("loss_coeff",), "Wrong.uses must be a frozenset, without an annotation"),
    ):
        wrong = dataclass(frozen=True)(type("Wrong", (RouterConfig,), {"uses": uses}))
        with pytest.raises(ValueError, match=message):
            MoEConfig(4, router=wrong())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: None, "returned a NoneType; return an nlgmoe.Routing"),
        (lambda r: replace(r, weight=r.weight.bfloat16()), "returned weights of torch.bfloat16; compute them in fp32"),
        (lambda r: replace(r, kept=r.kept[:, :1]), "returned kept of [32, 1], not [tokens, top_k] = [32, 2]"),
        (
            lambda r: replace(r, num_experts=3),
            "returned num_experts=3 and logits or probs of [[32, 4], [32, 4]], in a layer of 4",
        ),
        (lambda r: replace(r, expert=r.expert.float()), "returned expert of torch.float32; return numbers of experts"),
        (lambda r: replace(r, losses={"mine": r.logits.mean(0)}), "loss mine is no tensor without dimensions"),
        (lambda r: replace(r, losses={"lr": r.logits.mean()}), "loss lr needs a name of its own that ends with _loss"),
    ],
)
def test_what_a_router_returns_is_checked(change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(replace(CONFIG, moe=MoEConfig(4, top_k=2, router=CosineRouterConfig())))
    forward = type(model.blocks[1].moe.router).forward
    monkeypatch.setattr(type(model.blocks[1].moe.router), "forward", lambda *args: change(forward(*args)))
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.zeros(2, 16, dtype=torch.long))


def test_a_routers_loss_takes_the_name_of_no_metric() -> None:
    named = re.findall(r"^\| `train/(\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert {name for name in named if name.endswith("_loss")} - {"sequence_balance_loss"} == contract.PAPER_LOSSES
    window, batch = Window(), {"tokens": torch.zeros(1, 8)}
    window.add(batch, {"train/loss": torch.ones(()), "train/mine": torch.ones(())})
    with pytest.raises(ValueError, match=r"a step's micro-batches have other losses"):
        window.add(batch, {"train/loss": torch.ones(()), "train/other": torch.ones(())})


def test_a_cosine_router_learns_by_the_balance_loss() -> None:
    config = replace(CONFIG, moe=MoEConfig(4, top_k=2, loss_coeff=0.1, router=CosineRouterConfig(0.2)))
    model, tokens = GPT(config), torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))
    router = model.blocks[1].moe.router
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    routing = router(x, RoutingContext(mask=torch.tensor([[True] * 7 + [False]])))
    cosine = F.cosine_similarity(x.unsqueeze(1), router.weight.unsqueeze(0), dim=-1)  # [N, E]
    torch.testing.assert_close(routing.probs, (cosine / 0.2).softmax(dim=-1))
    torch.testing.assert_close(routing.weight[:7], routing.probs.topk(2).values[:7])
    assert not routing.kept[7].any() and not routing.weight[7].any()
    router_losses(model(tokens).routings)[0].backward()
    assert router.weight.grad.any()


def test_the_configuration_comes_back_from_plain_values() -> None:
    assert GPTConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert "router" not in GPTConfig(61, moe=MoEConfig()).to_dict()["moe"]
    plain = CONFIG.to_dict()
    plain["moe"]["router"]["class_path"] = "os.path"
    with pytest.raises(ValueError, match=r"os.path of the checkpoint is no RouterConfig"):
        GPTConfig.from_dict(plain)


def test_a_swiglu_expert_computes_what_it_says_and_is_counted() -> None:
    model = GPT(CONFIG)
    moe = model.blocks[1].moe
    x = torch.randn(2, 16, 16)
    tokens = torch.randint(61, (2, 16))
    y, routing = moe(x, RoutingContext(tokens))
    for token, expert, out in zip(x.flatten(0, 1), routing.expert.flatten(), y.flatten(0, 1), strict=True):
        w = {name: value[expert] for name, value in moe.experts.named_parameters()}
        gate, up = (token @ w[f"{name}_weight"] + w[f"{name}_bias"] for name in ("gate", "expand"))
        torch.testing.assert_close(out, (F.silu(gate) * up) @ w["project_weight"] + w["project_bias"])
    total, active = parameters_of(model)
    assert (count_parameters(CONFIG).total, count_parameters(CONFIG).active) == (total, active)
    std = {name: float(value.std()) for name, value in moe.experts.named_parameters() if name.endswith("weight")}
    assert std["project_weight"] < 0.7 * std["gate_weight"]  # divided by sqrt(2 * 2)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weights", [(16, 16, "expand")], "Wrong.weights returned a list; return a dictionary"),
        (
            "weights",
            {"a": (16, 16)},
            "Wrong.weights has 'a': (16, 16); write name: (inputs, outputs, 'expand' or 'project')",
        ),
        ("forward", None, "Wrong.forward returned a NoneType for rows of ["),
        ("forward", torch.zeros(1, 16), "Wrong.forward returned [1, 16] for rows of ["),
    ],
)
def test_what_an_expert_declares_and_returns_is_checked(part: str, value: Any, message: str) -> None:
    wrong = dataclass(frozen=True)(type("Wrong", (SwiGLUExpert,), {part: lambda *arguments: value}))
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT(replace(CONFIG, moe=MoEConfig(4, expert=wrong())))(torch.zeros(2, 16, dtype=torch.long))


def test_a_corpus_of_text_lines_is_trained_on_resumed_and_blended(
    pocket_pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (train := tmp_path / "train.txt").write_text("the king and the queen\nwent to the sea\n" * 50)
    (validation := tmp_path / "validation.txt").write_text("the queen and the king\n" * 20)
    files = {"train": str(train), "validation": str(validation)}
    tokenizer = load_tokenizer("pocket-1k", pocket_pile)
    tokens = LineCorpus(**files).open(pocket_pile, "pocket-1k").training_tokens()[0]
    assert tokens[-1] == tokenizer.eod_id and (tokens == tokenizer.eod_id).sum() == 100
    assert tokenizer.decode([one for one in tokens if one != tokenizer.eod_id]) == train.read_text().replace("\n", "")
    lines = {"class_path": "line_corpus.LineCorpus", "init_args": files}
    part = {"name": "lines", "weight": 1.0, "corpus": lines}
    corpora = {"blend": {"class_path": "nlgmoe.data.Blend", "init_args": {"parts": [part]}}, "alone": lines}
    for name, corpus in corpora.items():
        (file := tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"corpus": corpus}}))
        words = ["fit", "--config", str(ROOT / "configs/moe/laptop.yaml"), *TINY, "--config", str(file)]
        words += [f"--data.data_dir={pocket_pile}", f"--trainer.default_root_dir={tmp_path / name}"]
        main([*words, "--trainer.enable_progress_bar=false", "--model.train_tokens=128"])
        assert "lines" in json.loads((tmp_path / name / "summary.json").read_text())["bits_per_byte"]
    main([*words, "--model.train_tokens=256", "--ckpt_path=last"])
    (nothing := tmp_path / "nothing.txt").write_text("")
    with pytest.raises(ValueError, match=r"TokenArrays.tokens has no token of validation; give some text for it"):
        LineCorpus(str(train), str(nothing)).open(pocket_pile, "pocket-1k")
    ids = np.arange(9)
    for arrays, message in (
        ({"train": [ids]}, "TokenArrays.tokens has ['train']; give train and validation"),
        ({"train": [ids, ids], "validation": [ids]}, "has 2 arrays of train for the domains ['lines']; give one"),
        ({"train": [ids * 1.0], "validation": [ids]}, "has no array of token ids in train"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            TokenArrays(tokenizer, ["lines"], arrays, {})  # type: ignore[arg-type]
    train.write_text("another text\n" * 99)
    with pytest.raises(SystemExit):
        main([*words, "--model.train_tokens=512", "--ckpt_path=last"])
    assert "The checkpoint was trained on other data; these differ: corpus" in capsys.readouterr().err


class DropsOddTokens(Router):
    """Declares nothing but what it drops."""

    def forward(self, x: torch.Tensor, context: RoutingContext) -> Routing:
        token = torch.arange(len(x)).unsqueeze(-1)
        kept = token % 2 == 0
        return Routing(token % self.num_experts, kept.to(x.dtype), kept, self.num_experts)


def test_a_router_may_drop_tokens_without_a_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no expert, which `grouped_mm` leaves uninitialised, are not read."""
    grouped_mm = F.grouped_mm

    def poisoned(rows: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        unused = torch.arange(len(rows)) >= offs[-1]
        return grouped_mm(rows, weight, offs=offs).masked_fill(unused.unsqueeze(-1), torch.nan)

    monkeypatch.setattr(F, "grouped_mm", poisoned)
    moe = GPT(CONFIG).blocks[1].moe
    moe.router = DropsOddTokens(4)
    x = torch.randn(2, 16, 16, requires_grad=True)
    y, _ = moe(x, RoutingContext())
    y.square().sum().backward()
    even, odd = y.flatten(0, 1)[::2], y.flatten(0, 1)[1::2]
    assert torch.isfinite(even).all() and even.abs().min() > 0 and torch.equal(odd, torch.zeros_like(odd))
    assert all(torch.isfinite(value.grad).all() for value in (x, *moe.experts.parameters()))


class SpoilsSecondStep(Callback):
    """Makes a gradient NaN, and remembers a router's biases after each step."""

    def __init__(self) -> None:
        self.biases: list[torch.Tensor] = []

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == 1:
            pl_module.gpt.unembedding.grad.fill_(torch.nan)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.biases.append(pl_module.gpt.blocks[1].moe.router.bias.clone())


def test_a_router_learns_nothing_from_a_step_that_is_skipped(tmp_path: Path) -> None:
    config = replace(CONFIG, moe=MoEConfig(4, router=SigmoidTopK(0.01)))
    spoils = SpoilsSecondStep()
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=3, logger=False, callbacks=[spoils], **SILENT
    )
    trainer.fit(MoEGPTModule(config, non_finite=NonFinite("skip")), SyntheticData())
    first, second, third = spoils.biases
    assert torch.equal(first, second) and not torch.equal(second, third)
