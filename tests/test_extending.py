"""Routers, experts and attentions in a user's own files: trained, resumed, read, and refused where they are not known."""

import json
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cosine_router import CosineRouterConfig
from dense_mixer import DenseMixerConfig
from hash_router import HashRouterConfig
from line_corpus import LineCorpus
from swiglu_expert import SwiGLUExpert
from torch import nn
from torch.nn import functional as F

from nlgmoe import GPT, GPTConfig, MoEConfig, MoELayer, Routing
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.cli.train import main
from nlgmoe.commands.main import main as nlgmoe
from nlgmoe.data import OpenCorpus, load_tokenizer
from tests.support.commands import TINY
from tests.support.processes import ROOT, python

HASH = {"class_path": "hash_router.HashRouterConfig", "init_args": {"seed": 1}}
SWIGLU = {"class_path": "swiglu_expert.SwiGLUExpert", "init_args": {"multiple": 8}}
CONFIG = GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4, router=HashRouterConfig(1), expert=SwiGLUExpert(8)))
PARTS = {"model": {"config": {"moe": {"router": HASH, "expert": SWIGLU, "top_k": 1}}}}


def command(folder: Path, data_dir: Path, *settings: str, **parts: Any) -> list[str]:
    """Train a tiny model with parts of docs/examples: router and expert, or those given."""
    (file := folder.parent / f"{folder.name}.yaml").write_text(yaml.safe_dump(parts or PARTS))
    words = ["fit", "--config", str(ROOT / "configs/moe/laptop.yaml"), *TINY, "--config", str(file)]
    words += [f"--data.data_dir={data_dir}", f"--trainer.default_root_dir={folder}", *settings]
    return [*words, "--trainer.log_every_n_steps=2", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def whole(pocket_pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending") / "whole"
    main(command(folder, pocket_pile, "--model.train_tokens=256"))
    return folder


def test_own_router_is_trained_and_resumed_and_its_checkpoint_holds_the_buffers(
    whole: Path, pocket_pile: Path, tmp_path: Path
) -> None:
    halves = tmp_path / "halves"
    main(command(halves, pocket_pile, "--model.train_tokens=128"))
    main(command(halves, pocket_pile, "--model.train_tokens=256", "--ckpt_path=last"))
    ends = [Checkpoint(run / "checkpoints/last.ckpt").tensors("model").read_all() for run in (whole, halves)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    buffer = ends[0]["blocks.1.moe.router.table"]
    assert buffer.dtype == torch.int64 and buffer.any()
    assert "blocks.1.moe.experts.0.gate_weight" in ends[0]
    document = Checkpoint(whole / "checkpoints/last.ckpt").document
    assert document["model_config"]["moe"]["router"] == HASH and document["model_config"]["moe"]["expert"] == SWIGLU
    assert not list(find_problems(Checkpoint(whole / "checkpoints/last.ckpt")))
    columns = (whole / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "experts/0/load_cv" in columns and "experts/0/entropy" not in columns  # it has no probabilities


def test_commands_import_own_files_that_they_are_allowed_to(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", str(whole), "--prompt", "The", "--max-new-tokens", "2"]
    allowed = ["--allow-code", "hash_router", "--allow-code", "swiglu_expert"]
    done = python("-m", "nlgmoe", *generate, *allowed, cwd=ROOT / "docs/examples")
    assert done.returncode == 0 and done.stderr.startswith("newest checkpoint: ") and done.stderr.count("\n") == 1

    monkeypatch.delitem(sys.modules, "hash_router")
    capsys.readouterr()
    nlgmoe(["verify", str(whole / "checkpoints/last.ckpt")])
    assert "resumable\nvalid: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        nlgmoe(generate)
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: the checkpoint's model has hash_router.HashRouterConfig, code outside nlgmoe that is not imported; if you trust "
        "it, import hash_router first in Python, or give a command that has the option --allow-code "
        "hash_router"
    )


def test_own_file_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "unwritten.py").write_text("def (\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = "unwritten.X: cannot import unwritten (SyntaxError: invalid syntax (unwritten.py, line 1)); put its file"
    fit = ["fit", f"--config={ROOT}/configs/moe/laptop.yaml", "--model.config.moe.router=unwritten.X"]
    for function, words in ((main, fit), (nlgmoe, ["check", "unwritten.X"])):
        with pytest.raises(SystemExit) as end:
            function(words)
        assert (end.value.code, message in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, weight=r.weight.bfloat16()), "returned weights of torch.bfloat16; compute them in fp32"),
        (lambda r: replace(r, kept=r.kept[:, :1]), "Routing has kept of [32, 1], and expert of [32, 2]; both are"),
        (lambda r: Routing(r.expert[:, :1], r.weight[:, :1], r.kept[:, :1], 4), "returned expert of [32, 1], not"),
    ],
)
def test_own_router_is_checked_for_what_it_returns(change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(replace(CONFIG, moe=MoEConfig(4, top_k=2, router=CosineRouterConfig())))
    forward = type(model.blocks[1].moe.router).forward
    monkeypatch.setattr(type(model.blocks[1].moe.router), "forward", lambda *args: change(forward(*args)))
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.zeros(2, 16, dtype=torch.long))


def test_a_misspelt_field_that_a_router_reads_is_named() -> None:
    """It would otherwise turn that setting off."""
    wrong = dataclass(frozen=True)(type("Wrong", (CosineRouterConfig,), {"reads_fields": frozenset({"los_coeff"})}))
    with pytest.raises(ValueError, match=r"Wrong\.reads_fields names los_coeff; it may read aux_scope,"):
        MoEConfig(4, router=wrong())


def test_dense_mixer_has_the_value_of_top_1_and_the_gate_gradient_of_all_experts() -> None:
    """The gradient is that of `sum_i <dL/dy, expert_i(x)> p_i` over all experts, dL/dy that of the sparse output."""
    moe = MoEConfig(4, 2, top_k=4, router=DenseMixerConfig())
    torch.manual_seed(0)
    layer = MoELayer(GPTConfig(61, 8, 2, 16, 2, moe=moe), 1).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain = MoELayer(GPTConfig(61, 8, 2, 16, 2, moe=MoEConfig(4, 2, token_dropping=False)), 1).double()
    plain.load_state_dict(layer.state_dict())
    x, upstream = torch.randn(2, 2, 8, 16, dtype=torch.float64)
    for training in (True, False):
        y, routing = layer.train(training)(x)
        torch.testing.assert_close(y, plain.train(training)(x)[0])
        assert bool(routing.kept.all()) == training  # evaluation computes the chosen expert alone
    (layer.train()(x)[0] * upstream).sum().backward()
    (plain.train()(x)[0] * upstream).sum().backward()
    for name, parameter in layer.experts.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.experts.get_parameter(name).grad)
    weight, rows = layer.router.weight.detach().requires_grad_(), x.flatten(0, 1)
    each = torch.stack([layer.experts(rows, len(rows) * F.one_hot(torch.tensor(e), 4)) for e in range(4)], dim=1)
    score = (each.detach() * upstream.reshape(-1, 1, 16)).sum(-1)  # [N, E]
    (gradient,) = torch.autograd.grad(((rows @ weight.t()).softmax(-1) * score).sum(), weight)
    torch.testing.assert_close(layer.router.weight.grad, gradient)
    assert not torch.allclose(plain.router.weight.grad, gradient)


@pytest.mark.parametrize("path", ["os.path", "nlgmoe.layers.routers.softmax.SoftmaxTopK", "nlgmoe.SoftmaxTopK"])
def test_a_checkpoint_names_no_class_that_is_not_a_part(path: str) -> None:
    plain = CONFIG.to_dict()
    plain["moe"]["router"]["class_path"] = path
    with pytest.raises(ValueError, match=f"{path} of the checkpoint is no RouterConfig; use the version"):
        GPTConfig.from_dict(plain)


def test_own_attention_is_trained_resumed_and_read_where_allowed(
    pocket_pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    window = {"class_path": "window_attention.WindowAttentionConfig", "init_args": {"window": 4}}
    model = {"model": {"config": {"attention": window}}}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    main(command(whole, pocket_pile, "--model.train_tokens=256", **model))
    main(command(halves, pocket_pile, "--model.train_tokens=128", **model))
    main(command(halves, pocket_pile, "--model.train_tokens=256", "--ckpt_path=last", **model))
    weights, resumed = (
        Checkpoint(run / "checkpoints/last.ckpt").tensors("model").read_all() for run in (whole, halves)
    )
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())

    monkeypatch.delitem(sys.modules, "window_attention")
    generate = ["generate", str(whole), "--prompt", "The", "--max-new-tokens", "8"]
    for words, message in (
        (generate, "code outside nlgmoe that is not imported; if you trust it, import window_attention first"),
        ([*generate, "--allow-code", "window_attention"], None),
        (["export", str(whole), str(tmp_path / "export")], "only the paper's attention, not WindowAttentionConfig"),
        (["inspect", str(whole / "checkpoints/last.ckpt")], "does not know the memory of WindowAttentionConfig"),
    ):
        with nullcontext() if message is None else pytest.raises(SystemExit):
            nlgmoe(words)
        assert message is None or message in capsys.readouterr().err.splitlines()[-1]


def test_own_corpus_is_trained_on_resumed_and_blended(
    pocket_pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (train := tmp_path / "train.txt").write_text("the king and the queen\nwent to the sea\n" * 50)
    (validation := tmp_path / "validation.txt").write_text("the queen and the king\n" * 20)
    files = {"train": str(train), "validation": str(validation)}
    tokenizer = load_tokenizer("pocket-1k", pocket_pile)
    tokens = LineCorpus(**files).open(pocket_pile, "pocket-1k").tokens["train"][0]
    assert tokens[-1] == tokenizer.eod_id and (tokens == tokenizer.eod_id).sum() == 100
    assert tokenizer.decode([one for one in tokens if one != tokenizer.eod_id]) == train.read_text().replace("\n", "")
    lines = {"class_path": "line_corpus.LineCorpus", "init_args": files}
    part = {"name": "lines", "weight": 1.0, "corpus": lines}
    corpora = {"blend": {"class_path": "nlgmoe.data.Blend", "init_args": {"parts": [part]}}, "alone": lines}
    for name, corpus in corpora.items():
        words = command(tmp_path / name, pocket_pile, data={"corpus": corpus})
        main([*words, "--model.train_tokens=128"])
        assert "lines" in json.loads((tmp_path / name / "summary.json").read_text())["bits_per_byte"]
    main([*words, "--model.train_tokens=256", "--ckpt_path=last"])
    for arrays, message in (
        ({"train": [tokens]}, "OpenCorpus.tokens has ['train']; give train and validation"),
        ({"train": [tokens], "validation": [tokens[:0]]}, "OpenCorpus.tokens has no token of validation"),
        ({"train": [tokens[:0]], "validation": [tokens[:0]]}, "OpenCorpus.tokens has no token of validation"),
        ({"train": [tokens / 1], "validation": [tokens]}, "OpenCorpus.tokens has ['float64 "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            OpenCorpus(tokenizer, ["lines"], arrays, {})
    train.write_text("another text\n" * 99)
    with pytest.raises(SystemExit):
        main([*words, "--model.train_tokens=512", "--ckpt_path=last"])
    assert "The checkpoint was trained on other data; these differ: corpus" in capsys.readouterr().err
